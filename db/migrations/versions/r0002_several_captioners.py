"""A submission names several captioners, each with its checkpoint and settings."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ONE = ("captioner", "checkpoint", "settings")
SUBMISSIONS = sa.table(
    "submissions",
    sa.column("id", sa.String),
    sa.column("captioner", sa.Text),
    sa.column("checkpoint", sa.Text),
    sa.column("settings", sa.JSON),
    sa.column("captioners", sa.JSON),
)


def upgrade() -> None:
    """Go to this revision: the one captioner of each submission becomes the only one of its list."""
    op.add_column("submissions", sa.Column("captioners", sa.JSON(), nullable=True))
    connection = op.get_bind()
    for row in connection.execute(sa.select(SUBMISSIONS)).all():
        captioners = [{name: getattr(row, name) for name in ONE}]
        chosen = sa.update(SUBMISSIONS).where(SUBMISSIONS.c.id == row.id)
        connection.execute(chosen.values(captioners=captioners))
    with op.batch_alter_table("submissions") as batch:
        batch.alter_column("captioners", existing_type=sa.JSON(), nullable=False)
        for name in ONE:
            batch.drop_column(name)
