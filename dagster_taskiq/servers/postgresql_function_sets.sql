-- When the functions of each version of the package were last used, broker's and backend's alike:
-- suffix is how their names end. See postgresql_setup.sql.

CREATE TABLE IF NOT EXISTS {s}.function_sets (
  suffix text COLLATE "C" PRIMARY KEY,
  used_at timestamptz NOT NULL DEFAULT clock_timestamp());
