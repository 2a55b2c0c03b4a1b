"""How Alembic is run; the migrations of the outbox."""
