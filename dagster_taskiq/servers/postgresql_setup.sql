-- Makes one part of a deployment's schema, or brings it up to date, in one transaction. Where
-- there is nothing to do it does no harm, so that whoever is not sure executes it.
--
-- - {name} is the schema's name as a text, {lock} its advisory lock; {version_table} has the part's
--   version, {changes} are what has made it, each under its number.
-- - Two that make the same at the same time fail, whatever IF NOT EXISTS says: hence the lock, for
--   which one waits as long as the other takes.
-- - A change waits 800 ms for a reader: whoever claims waits behind it meanwhile.
-- - CREATE SCHEMA IF NOT EXISTS would ask for the right to make one where it is there too.

SELECT pg_advisory_xact_lock({lock});
SET LOCAL lock_timeout TO '800ms';
DO $setup$
DECLARE
  v_made int := 0;
BEGIN
  IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {name}) THEN
    CREATE SCHEMA {s};
  END IF;
  IF to_regclass(quote_ident({name}) || '.{version_table}') IS NOT NULL THEN
    SELECT number INTO v_made FROM {s}.{version_table};
  END IF;
{changes}
  IF v_made < {count} THEN
    UPDATE {s}.{version_table} SET number = {count}, oldest = {oldest};
  END IF;
END $setup$;
{functions}

-- The functions of versions that nobody has used for long go, if they are the user's own. A set
-- that nobody has noted, as all are after a TRUNCATE, counts as used now.
DO $remove$
DECLARE
  v_function text;
  v_until timestamptz := clock_timestamp() - interval '{unused_days} days';
BEGIN
  INSERT INTO {s}.function_sets (suffix) VALUES ('{v}')
    ON CONFLICT (suffix) DO UPDATE SET used_at = excluded.used_at;
  INSERT INTO {s}.function_sets (suffix)
    SELECT DISTINCT right(proname, {suffix_length}) FROM pg_proc
    WHERE pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = {name})
      AND proname ~ '_[0-9a-f]{12}$'
    ON CONFLICT DO NOTHING;
  FOR v_function IN
    SELECT p.oid::regprocedure FROM pg_proc AS p
    JOIN {s}.function_sets AS f ON f.suffix = right(p.proname, {suffix_length})
    WHERE p.pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = {name})
      AND f.used_at < v_until AND pg_has_role(p.proowner, 'USAGE')
  LOOP
    EXECUTE 'DROP FUNCTION ' || v_function;
  END LOOP;
  DELETE FROM {s}.function_sets WHERE used_at < v_until AND NOT EXISTS (
    SELECT FROM pg_proc
    WHERE pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = {name})
      AND right(proname, {suffix_length}) = suffix);
END $remove$;
