-- What a run's loop holds back. It counts while the run has that loop, whose token it has; what is
-- left of others goes with tidy.

-- Returns whether the loop has the run.
CREATE OR REPLACE FUNCTION {s}.tell_withheld{v}(p_run text, p_token text, p_data bytea)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
{begin}
  -- the lock makes the end of the run wait, which then takes what is written here
  PERFORM FROM {s}.runs
    WHERE run_id = p_run AND token = p_token AND lease_until > clock_timestamp() FOR SHARE;
  IF NOT FOUND THEN RETURN false; END IF;
  IF p_data IS NULL THEN
    DELETE FROM {s}.withheld WHERE run_id = p_run;
  ELSE
    INSERT INTO {s}.withheld (run_id, token, data) VALUES (p_run, p_token, p_data)
      ON CONFLICT (run_id) DO UPDATE SET token = excluded.token, data = excluded.data;
  END IF;
  RETURN true;
END $$;
