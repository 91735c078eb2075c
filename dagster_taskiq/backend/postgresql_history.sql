-- The PostgreSQL backend's functions for the history; see postgresql_functions.sql for their rules.


-- Adds ends and makes counters grow, unless the batch was added before. Counters are locked in the
-- order of their names; an end that another session removes just now is left to that one.
CREATE OR REPLACE FUNCTION {s}.add_history{v}(p_batch text, p_names text[], p_counts bigint[],
  p_groups text[], p_ends bytea[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  v_group text;
BEGIN
{begin}
  INSERT INTO {s}.batches (batch_id) VALUES (p_batch) ON CONFLICT DO NOTHING;
  IF NOT FOUND THEN RETURN; END IF;
  INSERT INTO {s}.history (group_name, data)
    SELECT added.group_name, added.data
    FROM unnest(p_groups, p_ends) WITH ORDINALITY AS added (group_name, data, place)
    ORDER BY added.place;
  FOR v_group IN SELECT DISTINCT name FROM unnest(p_groups) AS name LOOP
    DELETE FROM {s}.history WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM {s}.history WHERE group_name = v_group AND number <= (
        SELECT number FROM {s}.history WHERE group_name = v_group
        ORDER BY number DESC OFFSET {most_ends} LIMIT 1)
      FOR UPDATE SKIP LOCKED));
  END LOOP;
  INSERT INTO {s}.counts AS c (name, count)
    SELECT added.name, added.count FROM unnest(p_names, p_counts) AS added (name, count)
    ORDER BY added.name COLLATE "C"
    ON CONFLICT (name) DO UPDATE SET count = c.count + excluded.count;
END $$;

CREATE OR REPLACE FUNCTION {s}.list_history{v}(p_groups text[], p_most int)
RETURNS TABLE (one_end bytea) LANGUAGE plpgsql AS $$
BEGIN
  RETURN QUERY SELECT newest.data FROM unnest(p_groups) AS asked (name), LATERAL (
    SELECT h.data FROM {s}.history AS h
    WHERE h.group_name = asked.name
      AND h.added_at > clock_timestamp() - interval '{history} s'
    ORDER BY h.number DESC LIMIT p_most) AS newest;
END $$;

CREATE OR REPLACE FUNCTION {s}.list_counts{v}()
RETURNS TABLE (counter text, value bigint) LANGUAGE plpgsql AS $$
BEGIN
  RETURN QUERY SELECT name, count FROM {s}.counts;
END $$;

-- Part of tidy.
CREATE OR REPLACE FUNCTION {s}.tidy_history{v}(p_most int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM {s}.history WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {s}.history
    WHERE added_at < clock_timestamp() - interval '{history} s'
    LIMIT p_most FOR UPDATE SKIP LOCKED));
  DELETE FROM {s}.batches WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {s}.batches
    WHERE added_at < clock_timestamp() - interval '{batch} s' LIMIT p_most));
END $$;
