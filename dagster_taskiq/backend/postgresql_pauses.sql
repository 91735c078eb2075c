CREATE TABLE {s}.paused_queues (queue text COLLATE "C" PRIMARY KEY, pause bytea NOT NULL);
