-- What makes a replay one that can be trusted: the build before the live one is kept up to date, so that it can come
-- back; builds that are for inspection; events that wait because they, or one before them, could not be applied.

-- +goose Up
SET LOCAL lock_timeout = '3s'; -- rather fail, and be tried again, than make queries queue behind this

DROP VIEW wharf_read.builds;

ALTER TABLE wharf.builds
    DROP CONSTRAINT builds_state_check,
    ADD CONSTRAINT builds_state_check CHECK (state IN ('building', 'live', 'previous', 'scratch', 'retired')),
    ADD COLUMN purpose text NOT NULL DEFAULT 'replay', -- or looking
    ADD COLUMN keep_until timestamptz NOT NULL DEFAULT now(), -- of a build that is previous, scratch or retired
    ADD COLUMN verified_at timestamptz NOT NULL DEFAULT now(); -- or made, which begins with the same
CREATE UNIQUE INDEX one_previous_build ON wharf.builds (model) WHERE state = 'previous';

ALTER TABLE wharf.tasks
    ADD COLUMN epoch bigint NOT NULL DEFAULT 0, -- moved by others than the owner, whose memory is stale then
    ADD COLUMN seen_at timestamptz NOT NULL DEFAULT 'epoch', -- the time of the last event seen
    ADD COLUMN moved_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN rate double precision NOT NULL DEFAULT 0, -- events a second, lately
    ADD COLUMN trouble text NOT NULL DEFAULT ''; -- the last error that passed

-- Events that were not applied, in the order in which they came. A key is a stream's id or the text of a row's key; an
-- event waits for all events of its topic with one of its keys that came before it.
CREATE TABLE wharf.parked (
    build     bigint NOT NULL REFERENCES wharf.builds ON DELETE CASCADE,
    partition int NOT NULL,
    nr        bigint GENERATED ALWAYS AS IDENTITY,
    topic     text NOT NULL,
    seq       bigint NOT NULL,
    keys      text[] NOT NULL,
    error     text NOT NULL, -- empty for one that only waits
    event     json NOT NULL,
    parked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (build, partition, topic, seq)
);
CREATE INDEX ON wharf.parked USING gin (keys);

-- Events that an operator gave up: no build of the model applies them.
CREATE TABLE wharf.discarded (
    model        text NOT NULL,
    partition    int NOT NULL,
    topic        text NOT NULL,
    seq          bigint NOT NULL,
    discarded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (model, partition, topic, seq)
);

-- Programs from before this file, which know no epoch, go on as long as nobody has raised it.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION wharf.advance(b bigint, p int, in_state text, old_offsets bigint[], old_seqs bigint[],
    new_offsets bigint[], new_seqs bigint[], more_skipped bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wharf.tasks SET offsets = new_offsets, seqs = new_seqs, skipped = skipped + more_skipped, error = ''
    WHERE build = b AND partition = p AND epoch = 0 AND offsets = old_offsets AND seqs = old_seqs
      AND EXISTS (SELECT FROM wharf.builds WHERE id = b AND state = in_state);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the task of build % in partition % is not where its owner thinks', b, p USING ERRCODE = 'WH001';
    END IF;
END $$;
-- +goose StatementEnd

-- advance moves a task on by compare-and-set. It fails, and with it the transaction that writes the rows, when the task
-- is not where its owner thinks, or the build is not what its owner takes it for.
-- +goose StatementBegin
CREATE FUNCTION wharf.advance(b bigint, p int, in_state text, in_epoch bigint, old_offsets bigint[], old_seqs bigint[],
    new_offsets bigint[], new_seqs bigint[], more_skipped bigint, events bigint, last_seen timestamptz)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    at timestamptz := clock_timestamp();
BEGIN
    UPDATE wharf.tasks t SET offsets = new_offsets, seqs = new_seqs, skipped = skipped + more_skipped, error = '',
        seen_at = greatest(seen_at, last_seen), moved_at = at,
        rate = rate + (events / greatest(extract(epoch FROM at - moved_at), 0.001) - rate) *
            (1 - exp(-least(extract(epoch FROM at - moved_at) / 5, 100)))
    WHERE build = b AND partition = p AND epoch = in_epoch AND offsets = old_offsets AND seqs = old_seqs
      AND EXISTS (SELECT FROM wharf.builds WHERE id = b AND state = in_state);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the task of build % in partition % is not where its owner thinks', b, p USING ERRCODE = 'WH001';
    END IF;
END $$;
-- +goose StatementEnd

CREATE VIEW wharf_read.builds AS
SELECT b.id, b.model, b.version, b.state, b.topics, t.partition, t.offsets, t.seqs, t.skipped, t.error, t.trouble,
    b.purpose, t.seen_at, CASE WHEN t.moved_at > now() - interval '10 seconds' THEN t.rate ELSE 0 END AS rate,
    (SELECT count(*) FROM wharf.parked k WHERE k.build = b.id AND k.partition = t.partition) AS parked,
    CASE WHEN b.state IN ('previous', 'scratch') THEN b.keep_until END AS keep_until
FROM wharf.builds b JOIN wharf.tasks t ON t.build = b.id
WHERE b.state <> 'retired';
GRANT SELECT ON wharf_read.builds TO wharf_query;
