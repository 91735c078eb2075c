-- The PostgreSQL broker's functions: one call is one round trip and one transaction.
--
-- - {begin} is for one transaction. Commits are asynchronous: a crash that loses one lets a message
--   come again, which a claim refuses. {begin_durable} is for what a caller relies on: that a
--   message is sent, or withdrawn.
-- - A statement of its own finds a row and locks it, and the next one changes it: that one sees the
--   row as it is by then, also where the first had to look again.
-- - Rows that several calls may want are locked in the order of their keys, or skipped.
-- - {give_back} has what dead workers had in hand wait again, in its old place.
-- - Times are by clock_timestamp(), in a variable, without which no index would be used.


-- On each new connection. Returns the oldest version of the tables that must be known.
CREATE OR REPLACE FUNCTION {s}.enter_broker{v}() RETURNS int LANGUAGE plpgsql AS $$
BEGIN
{begin}
{note_use}
  RETURN (SELECT oldest FROM {s}.broker_version);
END $$;


-- A task that waits or is in hand already stays where it is: the sender was not sure.
CREATE OR REPLACE FUNCTION {s}.send{v}(p_queues text[], p_tasks text[], p_priorities smallint[],
  p_payloads bytea[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
{begin_durable}
  INSERT INTO {s}.messages (queue, task_id, priority, payload)
    SELECT sent.queue, sent.id, sent.priority, sent.payload
    FROM unnest(p_queues, p_tasks, p_priorities, p_payloads) WITH ORDINALITY
      AS sent (queue, id, priority, payload, n)
    ORDER BY sent.n
    ON CONFLICT DO NOTHING;
END $$;


-- The best message of the first of the queues that has one; queues are counted from 1. It looks
-- from the front, and says how long that took, or from the floors of each queue and priority on.
CREATE OR REPLACE FUNCTION {s}.take{v}(p_queues text[], p_seconds float8, p_floors bigint[],
  OUT v_queue int, OUT v_task text, OUT v_payload bytea, OUT v_holder uuid, OUT v_looked float8)
LANGUAGE plpgsql AS $$
DECLARE
  v_now timestamptz := clock_timestamp();
  v_rows tid[];
  v_row tid;
BEGIN
{begin}
  IF p_floors IS NULL THEN
{give_back}
  END IF;
  FOR v_queue IN SELECT generate_subscripts(p_queues, 1) LOOP
    IF p_floors IS NULL THEN
      SELECT ctid INTO v_row FROM {s}.messages WHERE queue = p_queues[v_queue] AND holder IS NULL
        ORDER BY priority DESC, number LIMIT 1 FOR UPDATE SKIP LOCKED;
    ELSE
      FOR v_priority IN REVERSE {highest}..0 LOOP
        SELECT ctid INTO v_row FROM {s}.messages
          WHERE queue = p_queues[v_queue] AND priority = v_priority AND holder IS NULL
            AND number >= p_floors[v_queue][v_priority + 1]
          ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED;
        EXIT WHEN FOUND;
      END LOOP;
    END IF;
    EXIT WHEN v_row IS NOT NULL;
  END LOOP;
  v_looked := extract(epoch FROM clock_timestamp() - v_now);
  IF v_row IS NULL THEN
    v_queue := 0;
  ELSE
    UPDATE {s}.messages SET holder = gen_random_uuid(),
        held_until = clock_timestamp() + p_seconds * interval '1 s'
      WHERE ctid = v_row
      RETURNING task_id, payload, holder INTO v_task, v_payload, v_holder;
  END IF;
END $$;

-- Of each queue and priority, from 0 on, the number below which nothing waits: the lowest that
-- waits, or else the last one that was given. It looks from the front or from earlier floors on.
-- What is being sent meanwhile may have a lower number.
CREATE OR REPLACE FUNCTION {s}.floors{v}(p_queues text[], p_floors bigint[],
  OUT v_floors bigint[], OUT v_looked float8) LANGUAGE plpgsql AS $$
DECLARE
  v_now timestamptz := clock_timestamp();
  v_rows tid[];
  v_last bigint;
BEGIN
{begin}
  IF p_floors IS NULL THEN
{give_back}
  END IF;
  SELECT last_value INTO v_last FROM {s}.messages_number_seq;
  SELECT array_agg(ARRAY(
      SELECT coalesce((SELECT number FROM {s}.messages
          WHERE queue = asked.name AND priority = p AND holder IS NULL
            AND number >= coalesce(p_floors[asked.n][p + 1], 0)
          ORDER BY number LIMIT 1), v_last)
        FROM generate_series(0, {highest}) AS p ORDER BY p) ORDER BY asked.n)
    INTO v_floors FROM unnest(p_queues) WITH ORDINALITY AS asked (name, n);
  v_looked := extract(epoch FROM clock_timestamp() - v_now);
END $$;


-- A delivery that is over stays so.
CREATE OR REPLACE FUNCTION {s}.hold{v}(p_queue text, p_tasks text[], p_holders uuid[],
  p_seconds float8) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  i int;
BEGIN
{begin}
  FOR i IN SELECT n FROM generate_subscripts(p_tasks, 1) AS n ORDER BY p_tasks[n] COLLATE "C" LOOP
    UPDATE {s}.messages SET held_until = clock_timestamp() + p_seconds * interval '1 s'
      WHERE queue = p_queue AND task_id = p_tasks[i] AND holder = p_holders[i];
  END LOOP;
END $$;


-- Wherever it is: a worker that was slow to ack has claimed the task, so a copy that went back to
-- its queue meanwhile is of no use to anybody.
CREATE OR REPLACE FUNCTION {s}.ack{v}(p_queue text, p_task text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
{begin}
  DELETE FROM {s}.messages WHERE queue = p_queue AND task_id = p_task;
END $$;

CREATE OR REPLACE FUNCTION {s}.release{v}(p_queue text, p_task text, p_holder uuid) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
{begin}
  UPDATE {s}.messages SET holder = NULL, held_until = NULL
    WHERE queue = p_queue AND task_id = p_task AND holder = p_holder;
END $$;


-- Returns those that waited.
CREATE OR REPLACE FUNCTION {s}.withdraw{v}(p_queue text, p_tasks text[])
RETURNS TABLE (id text) LANGUAGE plpgsql AS $$
BEGIN
{begin_durable}
  PERFORM FROM {s}.messages WHERE queue = p_queue AND task_id = ANY (p_tasks) AND holder IS NULL
    ORDER BY task_id FOR UPDATE;
  RETURN QUERY DELETE FROM {s}.messages
    WHERE queue = p_queue AND task_id = ANY (p_tasks) AND holder IS NULL RETURNING task_id;
END $$;

CREATE OR REPLACE FUNCTION {s}.absent{v}(p_queue text, p_tasks text[])
RETURNS TABLE (id text) LANGUAGE plpgsql AS $$
BEGIN
{begin}
  RETURN QUERY SELECT asked FROM unnest(p_tasks) AS asked WHERE NOT EXISTS (
    SELECT FROM {s}.messages WHERE queue = p_queue AND task_id = asked);
END $$;

CREATE OR REPLACE FUNCTION {s}.depth{v}(p_queue text) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
{begin}
  RETURN (SELECT count(*) FROM {s}.messages WHERE queue = p_queue AND holder IS NULL);
END $$;

-- From one queue to the next by the index, whatever waits in each.
CREATE OR REPLACE FUNCTION {s}.list_queues{v}() RETURNS TABLE (name text) LANGUAGE plpgsql AS $$
BEGIN
{begin}
  SELECT min(queue) INTO name FROM {s}.messages WHERE holder IS NULL;
  WHILE name IS NOT NULL LOOP
    RETURN NEXT;
    SELECT min(queue) INTO name FROM {s}.messages WHERE holder IS NULL AND queue > name;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION {s}.peek{v}(p_queue text, p_most int, p_longest int)
RETURNS TABLE (id text, rank smallint, data bytea) LANGUAGE plpgsql AS $$
BEGIN
{begin}
  RETURN QUERY
    SELECT task_id, priority, CASE WHEN length(payload) <= p_longest THEN payload ELSE '' END
    FROM {s}.messages WHERE queue = p_queue AND holder IS NULL
    ORDER BY priority DESC, number LIMIT p_most;
END $$;


-- The places of waiting messages, from 1; of none that has p_most others before it, as each count
-- reads so much of the index.
CREATE OR REPLACE FUNCTION {s}.places{v}(p_queue text, p_tasks text[], p_most int)
RETURNS TABLE (id text, place bigint) LANGUAGE plpgsql AS $$
DECLARE
  v_priority smallint;
  v_number bigint;
BEGIN
{begin}
  FOREACH id IN ARRAY p_tasks LOOP
    SELECT priority, number INTO v_priority, v_number FROM {s}.messages
      WHERE queue = p_queue AND task_id = id AND holder IS NULL;
    CONTINUE WHEN NOT FOUND;
    place := 1 + (SELECT count(*) FROM (SELECT FROM {s}.messages
      WHERE queue = p_queue AND holder IS NULL
        AND (priority > v_priority OR priority = v_priority AND number < v_number)
      ORDER BY priority DESC, number LIMIT p_most) AS before);
    CONTINUE WHEN place > p_most;
    RETURN NEXT;
  END LOOP;
END $$;


-- From one priority to the next by the index; a count reads the index alone.
CREATE OR REPLACE FUNCTION {s}.by_priority{v}(p_queue text, p_longest int)
RETURNS TABLE (tasks bigint, id text, rank smallint, data bytea) LANGUAGE plpgsql AS $$
BEGIN
{begin}
  rank := 32767;
  LOOP
    SELECT task_id, priority, CASE WHEN length(payload) <= p_longest THEN payload ELSE '' END
      INTO id, rank, data
      FROM {s}.messages WHERE queue = p_queue AND holder IS NULL AND priority < rank
      ORDER BY priority DESC, number LIMIT 1;
    EXIT WHEN NOT FOUND;
    tasks := (SELECT count(*) FROM {s}.messages
      WHERE queue = p_queue AND holder IS NULL AND priority = rank);
    RETURN NEXT;
  END LOOP;
END $$;


-- How many listeners look into the same queues, this one included.
CREATE OR REPLACE FUNCTION {s}.count_listeners{v}(p_listener uuid, p_queues text, p_seconds float8)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  v_now timestamptz := clock_timestamp();
BEGIN
{begin}
  INSERT INTO {s}.listeners (listener_id, queues, expires_at)
    VALUES (p_listener, p_queues, v_now + p_seconds * interval '1 s')
    ON CONFLICT (listener_id) DO UPDATE SET expires_at = excluded.expires_at;
  DELETE FROM {s}.listeners WHERE listener_id IN (
    SELECT listener_id FROM {s}.listeners WHERE expires_at <= v_now
    LIMIT 100 FOR UPDATE SKIP LOCKED);
  RETURN (SELECT count(*) FROM {s}.listeners WHERE queues = p_queues AND expires_at > v_now);
END $$;


-- The newest note of a run counts; what has expired goes with the next one, of whatever run.
CREATE OR REPLACE FUNCTION {s}.leave_note{v}(p_run text, p_note bytea, p_seconds float8)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  v_now timestamptz := clock_timestamp();
BEGIN
{begin}
  DELETE FROM {s}.notes WHERE run_id IN (SELECT run_id FROM {s}.notes WHERE expires_at <= v_now
    ORDER BY run_id LIMIT 100 FOR UPDATE SKIP LOCKED);
  INSERT INTO {s}.notes (run_id, note, expires_at)
    VALUES (p_run, p_note, v_now + p_seconds * interval '1 s')
    ON CONFLICT (run_id) DO UPDATE SET note = excluded.note, expires_at = excluded.expires_at;
END $$;

CREATE OR REPLACE FUNCTION {s}.take_note{v}(p_run text) RETURNS bytea LANGUAGE plpgsql AS $$
BEGIN
  RETURN (SELECT note FROM {s}.notes WHERE run_id = p_run AND expires_at > clock_timestamp());
END $$;
