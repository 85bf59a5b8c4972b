"""Alembic's entry: runs the migrations on the connection that `db.upgrade` hands over."""

from __future__ import annotations

from alembic import context

from db.tables import metadata

# DDL is part of the transaction on both dialects: a migration that fails leaves nothing behind.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
