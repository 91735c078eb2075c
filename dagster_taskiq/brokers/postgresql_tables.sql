-- The PostgreSQL broker's tables, as the first version made them. Later versions add to them, by
-- files of their own (see PART in postgresql.py); this one is never changed.
--
-- A message waits while it has no holder, and keeps its number, which is its place, all the time.
-- The holder is a delivery, not a worker: another delivery of the message is another holder.

CREATE TABLE {s}.broker_version (one boolean PRIMARY KEY DEFAULT true CHECK (one),
  number int NOT NULL, oldest int NOT NULL);
INSERT INTO {s}.broker_version (number, oldest) VALUES (0, 0);
CREATE TABLE {s}.messages (
  queue text COLLATE "C", task_id text COLLATE "C",
  priority smallint NOT NULL,
  number bigint GENERATED ALWAYS AS IDENTITY,
  payload bytea NOT NULL,
  holder uuid, held_until timestamptz,
  PRIMARY KEY (queue, task_id)
) WITH (fillfactor = 70, {many_deletes});
ALTER TABLE {s}.messages ALTER COLUMN payload SET STORAGE EXTERNAL;
CREATE INDEX messages_waiting ON {s}.messages (queue, priority DESC, number)
  WHERE holder IS NULL;
CREATE INDEX messages_in_hand ON {s}.messages (held_until) WHERE holder IS NOT NULL;
CREATE UNLOGGED TABLE {s}.listeners (
  listener_id uuid PRIMARY KEY, queues text COLLATE "C" NOT NULL, expires_at timestamptz NOT NULL
) WITH ({many_updates});
