-- The PostgreSQL backend's functions: each is one atomic step of a task's life (see life.py). The
-- table life is the server's: its id is the epoch.
--
-- One call is one round trip, one transaction and one plan. In a function each statement sees what
-- was committed before it, which the parts of one client's statement do not.
--
-- - What must hold is checked in the WHERE of the change: an UPDATE that waited for a row looks at
--   it again. Times are by clock_timestamp(); now() stands still while a lock is waited for.
-- - The epoch is read after the tables have been touched. From then on no TRUNCATE, which ends the
--   epoch, can come in between.
-- - Rows are locked in the order of their keys, and a run before its tasks, so that no two calls
--   wait for each other.
-- - {begin} is for one transaction. Commits are asynchronous: a crash that loses one ends the
--   epoch, too, and NOTIFY holds a lock of the whole cluster through a synchronous one. A SET
--   clause of the function would end before the commit. A lock is waited for less long than a
--   client waits for an answer. No plan reads a whole table, whatever the statistics of a table
--   that was never analyzed say; where one must, its price would start a just-in-time compiler.
--
-- {s} stands for the schema, {v} for what ends the names of this version's functions; the other
-- fragments are in postgresql_schema.py.


-- Which database this is. A standby that is promoted is the same one, and a dump that was loaded
-- elsewhere is not.
CREATE OR REPLACE FUNCTION {s}.identity{v}() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  v_text text;
BEGIN
  BEGIN
    SELECT system_identifier::text INTO v_text FROM pg_control_system();
  EXCEPTION WHEN insufficient_privilege OR undefined_function THEN
    v_text := '';
  END;
  SELECT v_text || ' ' || oid INTO v_text FROM pg_database WHERE datname = current_database();
  RETURN v_text;
END $$;

-- What the epoch is bound to beside its row, which a dump of the database would keep.
CREATE OR REPLACE FUNCTION {s}.life_of{v}() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  v_text text := {s}.identity{v}();
BEGIN
  -- there unlogged tables survive a crash
  IF to_regproc('aurora_version') IS NOT NULL THEN
    v_text := v_text || ' ' || extract(epoch FROM pg_postmaster_start_time());
  END IF;
  RETURN v_text;
END $$;

CREATE OR REPLACE FUNCTION {s}.new_epoch{v}() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  v_epoch text;
BEGIN
  INSERT INTO {s}.life (id, database)
    VALUES (replace(gen_random_uuid()::text, '-', ''), {s}.life_of{v}())
    ON CONFLICT DO NOTHING;
  SELECT id INTO STRICT v_epoch FROM {s}.life;
  RETURN v_epoch;
END $$;


-- On each new connection. Returns the oldest version of the tables that must be known.
CREATE OR REPLACE FUNCTION {s}.enter{v}() RETURNS int LANGUAGE plpgsql AS $$
DECLARE
  v_life text := {s}.life_of{v}();
BEGIN
{begin}
  IF EXISTS (SELECT FROM {s}.life WHERE database <> v_life) THEN
    DELETE FROM {s}.life WHERE database <> v_life;
  END IF;
{note_use}
  RETURN (SELECT oldest FROM {s}.version);
END $$;


-- ------------------------------------------------------------------------------ a run's loop

CREATE OR REPLACE FUNCTION {s}.open_run{v}(p_run text, p_generation int, p_token text,
  p_resumable boolean, p_lease float8, OUT v_epoch text, OUT v_generation int)
LANGUAGE plpgsql AS $$
BEGIN
{begin}
  INSERT INTO {s}.runs AS r (run_id, generation, token, lease_until, is_resumable)
    VALUES (p_run, p_generation, p_token, clock_timestamp() + p_lease * interval '1 s',
      p_resumable)
    ON CONFLICT (run_id) DO UPDATE SET generation = p_generation, token = p_token,
      lease_until = clock_timestamp() + p_lease * interval '1 s', is_resumable = p_resumable,
      is_closed = false, seen_at = clock_timestamp()
    WHERE p_generation > r.generation OR (p_generation = r.generation
      AND (r.token IS NOT DISTINCT FROM p_token OR r.lease_until <= clock_timestamp()));
  IF FOUND THEN
{epoch}
  ELSE
    SELECT generation INTO v_generation FROM {s}.runs WHERE run_id = p_run;
  END IF;
END $$;

CREATE OR REPLACE FUNCTION {s}.renew_run{v}(p_run text, p_generation int, p_token text,
  p_resumable boolean, p_lease float8) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  v_epoch text;
BEGIN
{begin}
  INSERT INTO {s}.runs AS r (run_id, generation, token, lease_until, is_resumable)
    VALUES (p_run, p_generation, p_token, clock_timestamp() + p_lease * interval '1 s',
      p_resumable)
    ON CONFLICT (run_id) DO UPDATE SET generation = p_generation, token = p_token,
      lease_until = clock_timestamp() + p_lease * interval '1 s',
      is_resumable = coalesce(r.is_resumable, p_resumable), is_closed = false,
      seen_at = clock_timestamp()
    WHERE p_generation > r.generation OR (p_generation = r.generation AND NOT r.is_closed
      AND (r.token IS NOT DISTINCT FROM p_token OR r.lease_until <= clock_timestamp()));
  IF NOT FOUND THEN RETURN NULL; END IF;
{epoch}
  RETURN v_epoch;
END $$;

CREATE OR REPLACE FUNCTION {s}.close_run{v}(p_run text, p_token text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
{begin}
  UPDATE {s}.runs SET is_resumable = false, is_closed = true, token = NULL, lease_until = 'epoch',
      seen_at = clock_timestamp()
    WHERE run_id = p_run AND token = p_token AND lease_until > clock_timestamp();
  IF FOUND THEN DELETE FROM {s}.withheld WHERE run_id = p_run; END IF;
END $$;

CREATE OR REPLACE FUNCTION {s}.disown_run{v}(p_run text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
{begin}
  INSERT INTO {s}.runs (run_id, is_resumable) VALUES (p_run, false)
    ON CONFLICT (run_id) DO UPDATE SET is_resumable = false, seen_at = clock_timestamp();
END $$;


-- -------------------------------------------------------------------- its results and tasks

CREATE OR REPLACE FUNCTION {s}.list_results{v}(p_run text)
RETURNS TABLE (task text, version text) LANGUAGE plpgsql AS $$
BEGIN
{begin}
  RETURN QUERY SELECT task_id, expires_at::text FROM {s}.results
    WHERE run_id = p_run AND expires_at > clock_timestamp();
END $$;

CREATE OR REPLACE FUNCTION {s}.read_results{v}(p_run text, p_tasks text[])
RETURNS TABLE (task text, version text, data bytea) LANGUAGE plpgsql AS $$
BEGIN
{begin}
  RETURN QUERY SELECT task_id, expires_at::text, result FROM {s}.results
    WHERE run_id = p_run AND task_id = ANY (p_tasks) AND expires_at > clock_timestamp();
END $$;

CREATE OR REPLACE FUNCTION {s}.forget_results{v}(p_run text, p_tasks text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  p_task text;
BEGIN
{begin}
  FOR p_task IN SELECT DISTINCT task COLLATE "C" FROM unnest(p_tasks) AS task ORDER BY 1 LOOP
    DELETE FROM {s}.results WHERE run_id = p_run AND task_id = p_task;
  END LOOP;
END $$;


-- The first row is the epoch, the others are the tasks by their numbers.
CREATE OR REPLACE FUNCTION {s}.inspect{v}(p_run text, p_tasks text[])
RETURNS TABLE (number int, word text, location text, seconds float8) LANGUAGE plpgsql AS $$
DECLARE
  v_epoch text;
BEGIN
{begin}
  -- what this locks keeps a TRUNCATE away
  PERFORM FROM {s}.runs, {s}.tasks WHERE runs.run_id = p_run AND tasks.run_id = p_run
    AND tasks.task_id = '';
{epoch}
  RETURN QUERY SELECT 0, v_epoch, NULL::text, 0::float8;
  RETURN QUERY
    SELECT asked.place_number::int,
      CASE
        WHEN t.state = 'claimed' AND t.lease_until > clock_timestamp() THEN 'claimed'
        WHEN (t.state IS NULL OR t.state IN ('claimed', 'dropped'))
          AND EXISTS (SELECT FROM {s}.results AS r WHERE r.run_id = p_run
            AND r.task_id = asked.id AND r.expires_at > clock_timestamp()) THEN 'done'
        WHEN t.state IS NULL THEN 'unknown'
        WHEN t.state = 'claimed' OR (t.state = 'dropped' AND t.dropped_epoch <> v_epoch)
          THEN 'expired'
        ELSE t.state
      END,
      CASE WHEN t.state = 'claimed' AND t.lease_until > clock_timestamp() THEN t.place END,
      greatest(0, extract(epoch FROM t.lease_until - clock_timestamp())::float8)
    FROM unnest(p_tasks) WITH ORDINALITY AS asked (id, place_number)
    LEFT JOIN {s}.tasks AS t ON t.run_id = p_run AND t.task_id = asked.id;
END $$;

-- For people: every run, with those of its tasks that have not ended by the record's words.
CREATE OR REPLACE FUNCTION {s}.list_runs{v}()
RETURNS TABLE (run text, has_loop boolean, resumable boolean, open_tasks text[], held_back bytea)
LANGUAGE plpgsql AS $$
BEGIN
{begin}
  RETURN QUERY
    SELECT r.run_id, r.token IS NOT NULL AND r.lease_until > clock_timestamp(),
      coalesce(r.is_resumable, false),
      ARRAY(SELECT t.task_id FROM {s}.tasks AS t
        WHERE t.run_id = r.run_id AND t.state IN ('claimed', 'refused', 'dropped')),
      (SELECT w.data FROM {s}.withheld AS w WHERE w.run_id = r.run_id AND w.token = r.token
        AND r.lease_until > clock_timestamp())
    FROM {s}.runs AS r ORDER BY r.run_id;
END $$;

CREATE OR REPLACE FUNCTION {s}.cancel{v}(p_run text, p_tasks text[], p_orders text[],
  p_expires float8) RETURNS TABLE (number int, word text) LANGUAGE plpgsql AS $$
{variables}
  p_task text;
  v_order text;
BEGIN
{begin}
  INSERT INTO {s}.runs (run_id) VALUES (p_run) ON CONFLICT DO NOTHING;
  FOR number, p_task, v_order IN
    SELECT asked.place_number, asked.id, asked.body
    FROM unnest(p_tasks, p_orders) WITH ORDINALITY AS asked (id, body, place_number)
    ORDER BY asked.id COLLATE "C"
  LOOP
    LOOP
{look}
      IF v_done THEN word := 'done'; EXIT; END IF;
      IF v_held THEN
        word := 'claimed';
        IF t.worker_id IS NOT NULL THEN
          INSERT INTO {s}.orders (worker_id, body, expires_at)
            VALUES (t.worker_id, v_order, clock_timestamp() + p_expires * interval '1 s');
        END IF;
      ELSIF t.state = 'claimed' THEN
        -- it may have started, so it is for the loop to judge; a worker that lives is told
        word := 'expired';
      ELSIF t.state = 'lost' THEN
        word := 'lost';
        EXIT;
      ELSE
        word := 'cancelled';
      END IF;
      IF v_found THEN
        UPDATE {s}.tasks SET
            state = CASE word WHEN 'cancelled' THEN word ELSE state END,
            cancel_order = CASE word WHEN 'cancelled' THEN cancel_order ELSE v_order END
          WHERE run_id = p_run AND task_id = p_task;
        EXIT;
      END IF;
      INSERT INTO {s}.tasks (run_id, task_id, state) VALUES (p_run, p_task, 'cancelled')
        ON CONFLICT DO NOTHING;
      EXIT WHEN FOUND;
    END LOOP;
    RETURN NEXT;
  END LOOP;
  -- what this locks keeps a TRUNCATE away, also where there was no task
  PERFORM FROM {s}.tasks WHERE run_id = p_run AND task_id = '';
{epoch}
  number := 0;
  word := v_epoch;
  RETURN NEXT;
END $$;

CREATE OR REPLACE FUNCTION {s}.condemn{v}(p_run text, p_task text) RETURNS boolean
LANGUAGE plpgsql AS $$
{variables}
BEGIN
{begin}
  INSERT INTO {s}.runs (run_id) VALUES (p_run) ON CONFLICT DO NOTHING;
  LOOP
{look}
    IF v_held OR v_result OR v_done THEN RETURN false; END IF;
    IF v_found THEN
      UPDATE {s}.tasks SET state = 'lost' WHERE run_id = p_run AND task_id = p_task;
      RETURN true;
    END IF;
    INSERT INTO {s}.tasks (run_id, task_id, state) VALUES (p_run, p_task, 'lost')
      ON CONFLICT DO NOTHING;
    IF FOUND THEN RETURN true; END IF;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION {s}.reopen{v}(p_run text, p_task text) RETURNS boolean
LANGUAGE plpgsql AS $$
{variables}
BEGIN
{begin}
{look}
  IF t.state = 'refused' THEN
    DELETE FROM {s}.results WHERE run_id = p_run AND task_id = p_task;
  ELSIF v_held OR v_result OR (v_found AND t.state NOT IN ('claimed', 'dropped')) THEN
    RETURN false;
  END IF;
  IF t.cancel_order IS NOT NULL THEN RETURN false; END IF;
  DELETE FROM {s}.tasks WHERE run_id = p_run AND task_id = p_task;
  RETURN true;
END $$;


-- ---------------------------------------------------------------------------------- claims

CREATE OR REPLACE FUNCTION {s}.claim{v}(p_run text, p_task text, p_token text, p_lease float8,
  p_epoch text, p_place text, p_worker text, p_needs_run boolean, p_until_begun boolean)
RETURNS text LANGUAGE plpgsql AS $$
{variables}
  v_alive boolean;
  v_waits boolean;
  v_state text;
  v_answer text;
  v_dropped text;
BEGIN
{begin}
  SELECT lease_until > clock_timestamp() INTO v_alive FROM {s}.runs WHERE run_id = p_run;
  IF NOT FOUND THEN
    -- the clean-up finds tasks by their run
    INSERT INTO {s}.runs (run_id) VALUES (p_run) ON CONFLICT DO NOTHING;
  END IF;
  LOOP
{look}
    IF v_held AND t.token = p_token THEN
      UPDATE {s}.tasks SET lease_until = clock_timestamp() + p_lease * interval '1 s',
          place = p_place, worker_id = p_worker
        WHERE run_id = p_run AND task_id = p_task;
      RETURN 'granted';
    END IF;
    v_waits := p_until_begun AND NOT coalesce(t.has_begun, false);
    IF v_held THEN RETURN CASE WHEN v_waits THEN 'pending' ELSE 'claimed' END; END IF;
    IF v_done THEN RETURN 'done'; END IF;
    IF v_found AND t.state <> 'dropped' AND NOT (v_waits AND t.state = 'claimed') THEN
      RETURN t.state;
    END IF;
    v_answer := 'granted';
    IF p_needs_run THEN
{epoch}
      -- a loop that lives after all must not wait for what is in no queue any more
      IF p_epoch <> v_epoch THEN
        v_answer := 'stale';
        v_dropped := '';
      ELSIF v_alive IS NOT TRUE THEN
        v_answer := 'run-gone';
        v_dropped := v_epoch;
      END IF;
    END IF;
    v_state := CASE v_answer WHEN 'granted' THEN 'claimed' ELSE 'dropped' END;
    IF v_found THEN
      IF v_state = 'claimed' THEN
        UPDATE {s}.tasks SET state = v_state, token = p_token, place = p_place,
            worker_id = p_worker, lease_until = clock_timestamp() + p_lease * interval '1 s'
          WHERE run_id = p_run AND task_id = p_task;
      ELSE
        UPDATE {s}.tasks SET state = v_state, dropped_epoch = v_dropped
          WHERE run_id = p_run AND task_id = p_task;
      END IF;
      RETURN v_answer;
    END IF;
    IF v_state = 'claimed' THEN
      INSERT INTO {s}.tasks (run_id, task_id, state, token, place, worker_id, lease_until)
        VALUES (p_run, p_task, v_state, p_token, p_place, p_worker,
          clock_timestamp() + p_lease * interval '1 s')
        ON CONFLICT DO NOTHING;
    ELSE
      INSERT INTO {s}.tasks (run_id, task_id, state, dropped_epoch)
        VALUES (p_run, p_task, v_state, v_dropped) ON CONFLICT DO NOTHING;
    END IF;
    IF FOUND THEN RETURN v_answer; END IF;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION {s}.begin{v}(p_run text, p_task text, p_token text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
{begin}
  UPDATE {s}.tasks SET has_begun = true
    WHERE run_id = p_run AND task_id = p_task AND token = p_token AND state = 'claimed'
      AND lease_until > clock_timestamp();
END $$;


CREATE OR REPLACE FUNCTION {s}.release{v}(p_run text, p_task text, p_token text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
{begin}
  UPDATE {s}.tasks SET lease_until = 'epoch'
    WHERE run_id = p_run AND task_id = p_task AND token = p_token AND state = 'claimed';
END $$;


-- Puts a claim back that the server, in a new life, may have forgotten, unless it was judged.
CREATE OR REPLACE FUNCTION {s}.assert_claim{v}(p_run text, p_task text, p_token text,
  p_lease float8, p_place text, p_worker text) RETURNS boolean LANGUAGE plpgsql AS $$
{variables}
BEGIN
  INSERT INTO {s}.runs (run_id) VALUES (p_run) ON CONFLICT DO NOTHING;
  LOOP
{look}
    IF v_held OR (v_found AND t.state NOT IN ('claimed', 'dropped')) THEN RETURN false; END IF;
    IF v_found THEN
      UPDATE {s}.tasks SET state = 'claimed', token = p_token, place = p_place,
          worker_id = p_worker, lease_until = clock_timestamp() + p_lease * interval '1 s'
        WHERE run_id = p_run AND task_id = p_task;
      RETURN true;
    END IF;
    INSERT INTO {s}.tasks (run_id, task_id, state, token, place, worker_id, lease_until)
      VALUES (p_run, p_task, 'claimed', p_token, p_place, p_worker,
        clock_timestamp() + p_lease * interval '1 s')
      ON CONFLICT DO NOTHING;
    IF FOUND THEN RETURN true; END IF;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION {s}.renew{v}(p_runs text[], p_tasks text[], p_tokens text[],
  p_leases float8[], p_epochs text[], p_places text[], p_workers text[])
RETURNS TABLE (number int, is_held boolean, told text, is_alive boolean, may_follow boolean,
  epoch text)
LANGUAGE plpgsql AS $$
DECLARE
  v_epoch text;
  i int;
BEGIN
{begin}
  FOR i IN SELECT n FROM generate_subscripts(p_tasks, 1) AS n
    ORDER BY p_runs[n] COLLATE "C", p_tasks[n] COLLATE "C", n
  LOOP
    number := i;
    told := NULL;
    UPDATE {s}.tasks SET lease_until = clock_timestamp() + p_leases[i] * interval '1 s',
        place = p_places[i]
      WHERE run_id = p_runs[i] AND task_id = p_tasks[i] AND token = p_tokens[i]
        AND state = 'claimed' AND lease_until > clock_timestamp()
      RETURNING cancel_order INTO told;
    is_held := FOUND;
    SELECT lease_until > clock_timestamp(), is_resumable INTO is_alive, may_follow
      FROM {s}.runs WHERE run_id = p_runs[i];
{epoch}
    epoch := v_epoch;
    IF NOT is_held THEN
      IF p_epochs[i] <> v_epoch THEN
        is_held := {s}.assert_claim{v}(p_runs[i], p_tasks[i], p_tokens[i], p_leases[i],
          p_places[i], p_workers[i]);
      END IF;
      SELECT cancel_order INTO told FROM {s}.tasks
        WHERE run_id = p_runs[i] AND task_id = p_tasks[i];
    END IF;
    RETURN NEXT;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION {s}.complete{v}(p_run text, p_task text, p_token text, p_epoch text,
  p_result bytea, p_expires float8, p_state text, p_channel text)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  t {s}.tasks%ROWTYPE;
  v_epoch text;
BEGIN
{begin}
  LOOP
    UPDATE {s}.tasks SET state = p_state, cancel_order = NULL, dropped_epoch = NULL
      WHERE run_id = p_run AND task_id = p_task AND token = p_token AND state = 'claimed'
        AND lease_until > clock_timestamp();
    EXIT WHEN FOUND;
    SELECT * INTO t FROM {s}.tasks WHERE run_id = p_run AND task_id = p_task FOR UPDATE;
    IF FOUND AND t.state = p_state AND t.token = p_token THEN RETURN true; END IF;
    -- a claim that the server, in a new life, may have forgotten is put back and ended
{epoch}
    IF p_epoch = v_epoch
      OR NOT {s}.assert_claim{v}(p_run, p_task, p_token, 60, NULL, NULL) THEN
      RETURN false;
    END IF;
  END LOOP;
  INSERT INTO {s}.results (run_id, task_id, result, expires_at)
    VALUES (p_run, p_task, p_result, clock_timestamp() + p_expires * interval '1 s')
    ON CONFLICT (run_id, task_id) DO UPDATE SET result = excluded.result,
      expires_at = excluded.expires_at;
  IF p_channel IS NOT NULL THEN
    PERFORM pg_notify(p_channel, CASE WHEN length(p_task) < 1000 THEN p_task ELSE '' END);
  END IF;
  RETURN true;
END $$;


-- ---------------------------------------------------------- the list of workers, and their orders

-- Returns how many workers there are.
CREATE OR REPLACE FUNCTION {s}.heartbeat{v}(p_worker text, p_record bytea, p_running bytea,
  p_expires float8) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
{begin}
  INSERT INTO {s}.workers (worker_id, record, running, expires_at)
    VALUES (p_worker, p_record, p_running, clock_timestamp() + p_expires * interval '1 s')
    ON CONFLICT (worker_id) DO UPDATE SET record = excluded.record, running = excluded.running,
      expires_at = excluded.expires_at;
  RETURN (SELECT count(*) FROM {s}.workers WHERE expires_at > clock_timestamp());
END $$;

CREATE OR REPLACE FUNCTION {s}.goodbye{v}(p_worker text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
{begin}
  DELETE FROM {s}.workers WHERE worker_id = p_worker;
  DELETE FROM {s}.orders WHERE worker_id = p_worker;
END $$;

CREATE OR REPLACE FUNCTION {s}.list_workers{v}()
RETURNS TABLE (id text, data bytea) LANGUAGE plpgsql AS $$
BEGIN
  RETURN QUERY SELECT worker_id, record FROM {s}.workers WHERE expires_at > clock_timestamp();
END $$;

CREATE OR REPLACE FUNCTION {s}.list_lost_workers{v}()
RETURNS TABLE (id text, data bytea) LANGUAGE plpgsql AS $$
BEGIN
  RETURN QUERY SELECT worker_id, record FROM {s}.workers
    WHERE expires_at <= clock_timestamp() AND expires_at > clock_timestamp() - interval '{lost} s';
END $$;

CREATE OR REPLACE FUNCTION {s}.list_running{v}()
RETURNS TABLE (id text, data bytea) LANGUAGE plpgsql AS $$
BEGIN
  RETURN QUERY SELECT worker_id, running FROM {s}.workers
    WHERE running IS NOT NULL AND expires_at > clock_timestamp();
END $$;

CREATE OR REPLACE FUNCTION {s}.send_order{v}(p_worker text, p_body text, p_expires float8)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
{begin}
  INSERT INTO {s}.orders (worker_id, body, expires_at)
    VALUES (p_worker, p_body, clock_timestamp() + p_expires * interval '1 s');
END $$;

CREATE OR REPLACE FUNCTION {s}.take_orders{v}(p_worker text, p_most int)
RETURNS TABLE (text_of_order text) LANGUAGE plpgsql AS $$
BEGIN
{begin}
  IF NOT EXISTS (SELECT FROM {s}.orders WHERE worker_id = p_worker) THEN RETURN; END IF;
  RETURN QUERY
    WITH taken AS (
      DELETE FROM {s}.orders WHERE worker_id = p_worker AND number IN (
        SELECT number FROM {s}.orders WHERE worker_id = p_worker ORDER BY number LIMIT p_most)
      RETURNING number, body, expires_at)
    SELECT body FROM taken WHERE expires_at > clock_timestamp() ORDER BY number;
END $$;


-- Removes what has expired, a bounded amount; one session at a time. Returns how many tasks went.
CREATE OR REPLACE FUNCTION {s}.tidy{v}(p_most int) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
  v_run text;
  v_number int;
  v_sum int := 0;
BEGIN
  PERFORM set_config('synchronous_commit', 'off', true), set_config('lock_timeout', '3s', true);
  IF NOT pg_try_advisory_xact_lock({lock}) THEN RETURN 0; END IF;
  FOR v_run IN
    SELECT r.run_id FROM {s}.runs AS r,
      LATERAL (SELECT clock_timestamp() - CASE WHEN r.is_closed
        THEN interval '{closed} s'
        ELSE interval '{open} s' END AS ago) AS old
    WHERE r.seen_at < old.ago AND r.lease_until < old.ago
      AND NOT EXISTS (SELECT FROM {s}.tasks AS t
        WHERE t.run_id = r.run_id AND t.lease_until >= old.ago)
    ORDER BY r.run_id LIMIT p_most FOR UPDATE OF r SKIP LOCKED
  LOOP
    DELETE FROM {s}.tasks WHERE run_id = v_run;
    GET DIAGNOSTICS v_number = ROW_COUNT;
    v_sum := v_sum + v_number;
    DELETE FROM {s}.results WHERE run_id = v_run;
    DELETE FROM {s}.runs WHERE run_id = v_run;
    EXIT WHEN v_sum > 100 * p_most;
  END LOOP;
  DELETE FROM {s}.results WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {s}.results WHERE expires_at < clock_timestamp() LIMIT 10 * p_most));
  DELETE FROM {s}.orders WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {s}.orders WHERE expires_at < clock_timestamp() LIMIT 10 * p_most));
  DELETE FROM {s}.workers WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {s}.workers WHERE expires_at < clock_timestamp() - interval '{lost} s'
    LIMIT 10 * p_most));
  DELETE FROM {s}.withheld WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {s}.withheld AS w
    WHERE NOT EXISTS (SELECT FROM {s}.runs AS r WHERE r.run_id = w.run_id) LIMIT 10 * p_most));
  PERFORM {s}.tidy_history{v}(10 * p_most);
  RETURN v_sum;
END $$;


-- A pause outlives a crash: nobody would notice that tasks of a paused queue are executed.
CREATE OR REPLACE FUNCTION {s}.pause_queue{v}(p_queue text, p_pause bytea) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
{begin_durable}
  INSERT INTO {s}.paused_queues (queue, pause) VALUES (p_queue, p_pause)
    ON CONFLICT (queue) DO UPDATE SET pause = excluded.pause;
END $$;

-- Returns whether it was paused.
CREATE OR REPLACE FUNCTION {s}.resume_queue{v}(p_queue text) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
{begin_durable}
  DELETE FROM {s}.paused_queues WHERE queue = p_queue;
  RETURN FOUND;
END $$;

CREATE OR REPLACE FUNCTION {s}.list_pauses{v}()
RETURNS TABLE (name text, data bytea) LANGUAGE plpgsql AS $$
BEGIN
  RETURN QUERY SELECT queue, pause FROM {s}.paused_queues;
END $$;
