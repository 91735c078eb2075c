CREATE UNLOGGED TABLE {s}.notes (
  run_id text COLLATE "C" PRIMARY KEY, note bytea NOT NULL, expires_at timestamptz NOT NULL);
