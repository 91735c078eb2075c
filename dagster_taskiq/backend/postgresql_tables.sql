-- The PostgreSQL backend's tables, as the first version made them. Later versions add to them, by
-- files of their own (see PART in postgresql_schema.py); this one is never changed.

CREATE TABLE {s}.version (one boolean PRIMARY KEY DEFAULT true CHECK (one),
  number int NOT NULL, oldest int NOT NULL);
INSERT INTO {s}.version (number, oldest) VALUES (0, 0);
CREATE UNLOGGED TABLE {s}.life (one boolean PRIMARY KEY DEFAULT true CHECK (one),
  id text NOT NULL, database text NOT NULL);
CREATE TABLE {s}.runs (
  run_id text COLLATE "C" PRIMARY KEY,
  generation int NOT NULL DEFAULT -1,
  token text COLLATE "C",
  lease_until timestamptz NOT NULL DEFAULT 'epoch',
  is_resumable boolean,
  is_closed boolean NOT NULL DEFAULT false,
  seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH ({many_updates});
CREATE TABLE {s}.tasks (
  run_id text COLLATE "C", task_id text COLLATE "C",
  state text COLLATE "C" NOT NULL
    CHECK (state IN ('claimed', 'done', 'refused', 'cancelled', 'lost', 'dropped')),
  token text COLLATE "C",
  lease_until timestamptz NOT NULL DEFAULT 'epoch',
  place text, worker_id text COLLATE "C",
  has_begun boolean NOT NULL DEFAULT false,
  dropped_epoch text COLLATE "C",
  cancel_order text,
  PRIMARY KEY (run_id, task_id)
) WITH ({many_updates});
CREATE UNLOGGED TABLE {s}.results (
  run_id text COLLATE "C", task_id text COLLATE "C",
  result bytea NOT NULL, expires_at timestamptz NOT NULL,
  PRIMARY KEY (run_id, task_id)
) WITH ({many_deletes});
ALTER TABLE {s}.results ALTER COLUMN result SET STORAGE EXTERNAL;
CREATE UNLOGGED TABLE {s}.orders (
  worker_id text COLLATE "C", number bigint GENERATED ALWAYS AS IDENTITY,
  body text NOT NULL, expires_at timestamptz NOT NULL,
  PRIMARY KEY (worker_id, number));
CREATE UNLOGGED TABLE {s}.workers (
  worker_id text COLLATE "C" PRIMARY KEY, record bytea NOT NULL, expires_at timestamptz NOT NULL,
  running bytea
) WITH ({many_updates});
CREATE FUNCTION {s}.end_life() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN DELETE FROM {s}.life; RETURN NULL; END $$;
CREATE TRIGGER end_life AFTER TRUNCATE ON {s}.runs
  FOR EACH STATEMENT EXECUTE FUNCTION {s}.end_life();
CREATE TRIGGER end_life AFTER TRUNCATE ON {s}.tasks
  FOR EACH STATEMENT EXECUTE FUNCTION {s}.end_life();
