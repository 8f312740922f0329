-- The engine's own tables. Those of read models are made per build, in a schema of the build's own.

-- +goose Up
CREATE SCHEMA wharf_read;

CREATE TABLE wharf.builds (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    model      text NOT NULL,
    version    int NOT NULL,
    partitions int NOT NULL,
    topics     text[] NOT NULL,
    state      text NOT NULL CHECK (state IN ('building', 'live', 'retired')),
    created_at timestamptz NOT NULL DEFAULT now(),
    live_at    timestamptz,
    retired_at timestamptz
);
CREATE UNIQUE INDEX one_live_build ON wharf.builds (model) WHERE state = 'live';

-- How far a build is in one partition number. The arrays have a place per topic of the build, in its order: the next
-- offset to read, and the journalseq of the last event seen.
CREATE TABLE wharf.tasks (
    build     bigint NOT NULL REFERENCES wharf.builds ON DELETE CASCADE,
    partition int NOT NULL,
    offsets   bigint[] NOT NULL,
    seqs      bigint[] NOT NULL,
    skipped   bigint NOT NULL DEFAULT 0,
    error     text NOT NULL DEFAULT '', -- why it is halted
    PRIMARY KEY (build, partition)
) WITH (fillfactor = 50);

-- advance moves a task on by compare-and-set. It fails, and with it the transaction that writes the rows, when the task
-- is not where its owner thinks, or the build is not what its owner takes it for.
-- +goose StatementBegin
CREATE FUNCTION wharf.advance(b bigint, p int, in_state text, old_offsets bigint[], old_seqs bigint[],
    new_offsets bigint[], new_seqs bigint[], more_skipped bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE wharf.tasks SET offsets = new_offsets, seqs = new_seqs, skipped = skipped + more_skipped, error = ''
    WHERE build = b AND partition = p AND offsets = old_offsets AND seqs = old_seqs
      AND EXISTS (SELECT FROM wharf.builds WHERE id = b AND state = in_state);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the task of build % in partition % is not where its owner thinks', b, p USING ERRCODE = 'WH001';
    END IF;
END $$;
-- +goose StatementEnd

CREATE VIEW wharf_read.builds AS
SELECT b.id, b.model, b.version, b.state, b.topics, t.partition, t.offsets, t.seqs, t.skipped, t.error
FROM wharf.builds b JOIN wharf.tasks t ON t.build = b.id
WHERE b.state <> 'retired';

-- A role belongs to the whole server: it may be there already, or be made for another database at this moment.
-- +goose StatementBegin
DO $$
BEGIN
    CREATE ROLE wharf_query NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL;
END $$;
-- +goose StatementEnd
GRANT wharf_query TO CURRENT_USER;
GRANT USAGE ON SCHEMA wharf_read TO wharf_query;
GRANT SELECT ON wharf_read.builds TO wharf_query;
