-- What runs hold back, for people: a crash may take it. Never changed, as the first tables are not.

CREATE UNLOGGED TABLE {s}.withheld (
  run_id text COLLATE "C" PRIMARY KEY, token text COLLATE "C" NOT NULL, data bytea NOT NULL
) WITH ({many_updates});
