-- What the history is kept in: the ends of each group, the newest with the highest number, and the
-- counters. The batches that were added last are known by their ids. Never changed, as the first
-- tables are not.

CREATE TABLE {s}.history (
  group_name text COLLATE "C", number bigint GENERATED ALWAYS AS IDENTITY,
  data bytea NOT NULL, added_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (group_name, number)
) WITH ({many_deletes});
CREATE TABLE {s}.counts (
  name text COLLATE "C" PRIMARY KEY, count bigint NOT NULL
) WITH ({many_updates});
CREATE UNLOGGED TABLE {s}.batches (
  batch_id text COLLATE "C" PRIMARY KEY,
  added_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH ({many_deletes});
