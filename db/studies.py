"""Studies and images: what the files' bytes say, one row each for all submissions."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from db.rows import insert_new
from db.tables import clean_text, images, studies
from readroom.errors import BadCall
from readroom.records import FoundImage

ImageKey = tuple[str, int, str]


def image_key(found: FoundImage) -> ImageKey:
    """What makes two images the same: the file's digest, the frame, the SOP Instance UID."""
    return found.ref.digest, found.ref.frame, clean_text(found.sop_instance_uid or "")


def study_uid(found: FoundImage) -> str:
    """The Study Instance UID as the store holds it; "" when the image is not DICOM."""
    return clean_text(found.study_instance_uid or "")


def add_studies(connection: Connection, found: Sequence[FoundImage], moment: float) -> tuple[dict[str, int], int]:
    """Row ids by Study Instance UID, and how many studies are new. The first one to name a study describes it."""
    rows = {study_uid(one): _describe_study(one, moment) for one in reversed(found) if study_uid(one)}
    if not rows:
        return {}, 0
    columns = (studies.c.id, studies.c.study_instance_uid)
    # In the order of the UIDs: two producers that add the same studies wait for each other in one direction only.
    inserted = insert_new(connection, studies, [rows[uid] for uid in sorted(rows)], columns)
    new = {row.study_instance_uid: row.id for row in inserted}
    old = select(*columns).where(studies.c.study_instance_uid.in_(rows.keys() - new.keys()))
    known = {row.study_instance_uid: row.id for row in connection.execute(old)} if len(new) < len(rows) else {}
    return {**known, **new}, len(new)


def add_images(
    connection: Connection, found: Sequence[FoundImage], study_ids: dict[str, int], moment: float
) -> tuple[dict[ImageKey, int], int]:
    """Row ids by image key, and how many images are new. A known image that was found elsewhere moves there."""
    rows = {image_key(one): _describe_image(one, study_ids, moment) for one in found}
    columns = (images.c.id, images.c.digest, images.c.frame, images.c.sop_instance_uid)
    inserted = insert_new(connection, images, [rows[key] for key in sorted(rows)], columns)
    ids = {(row.digest, row.frame, row.sop_instance_uid): row.id for row in inserted}
    new = len(ids)
    if new < len(rows):
        ids |= _find_images(connection, {key: row for key, row in rows.items() if key not in ids})
    return ids, new


def _find_images(connection: Connection, rows: dict[ImageKey, dict[str, Any]]) -> dict[ImageKey, int]:
    columns = (images.c.id, images.c.digest, images.c.frame, images.c.sop_instance_uid, images.c.path, images.c.member)
    found = connection.execute(select(*columns).where(images.c.digest.in_({key[0] for key in rows})).order_by("id"))
    ids, moved = {}, []
    for number, digest, frame, uid, path, member in found:
        row = rows.get((digest, frame, uid))
        if row is None:
            continue
        ids[digest, frame, uid] = number
        if (path, member) != (row["path"], row["member"]):
            moved.append({"row": number, "new_path": row["path"], "new_member": row["member"]})
    _move_images(connection, moved)
    return ids


def _move_images(connection: Connection, moved: list[dict[str, Any]]) -> None:
    if moved:
        places: dict[str, Any] = {"path": bindparam("new_path"), "member": bindparam("new_member")}
        connection.execute(update(images).where(images.c.id == bindparam("row")).values(places), moved)


def _describe_study(found: FoundImage, moment: float) -> dict[str, Any]:
    return {
        "study_key": secrets.token_hex(8),
        "study_instance_uid": study_uid(found),
        "accession_number": found.accession_number,
        "patient_id": found.patient_id,
        "created_at": moment,
    }


def _describe_image(found: FoundImage, study_ids: dict[str, int], moment: float) -> dict[str, Any]:
    if not found.ref.digest:
        raise BadCall("an image without its digest cannot be stored")
    return {
        "digest": found.ref.digest,
        "frame": found.ref.frame,
        "sop_instance_uid": found.sop_instance_uid or "",
        "series_instance_uid": found.series_instance_uid,
        "study_id": study_ids.get(study_uid(found)),
        "path": found.ref.path,
        "member": found.ref.member,
        "view": found.view,
        "view_rank": found.view_rank,
        "rows": found.rows,
        "columns": found.columns,
        "size_bytes": found.size_bytes,
        "flags": list(found.flags),
        "created_at": moment,
    }
