-- Which topics a build was made of: one that was made anew, or another Kafka's, has other events at the same positions.

-- +goose Up
SET LOCAL lock_timeout = '200ms'; -- rather fail, and be tried again, than make queries queue behind this

DROP VIEW wharf_read.builds; -- first: who reads it locks it before the tables, too

ALTER TABLE wharf.builds ADD COLUMN topic_ids text[] NOT NULL DEFAULT '{}'; -- in the order of topics; empty where it is not known

ALTER TABLE wharf.discarded ADD COLUMN topic_id text NOT NULL DEFAULT '';

-- 1464353107 is the class of the advisory lock that who makes a build holds, with the build's id (build.go).
CREATE VIEW wharf_read.builds AS
SELECT b.id, b.model, b.version, b.state, b.topics, t.partition, t.offsets, t.seqs, t.skipped, t.error, t.trouble,
    b.purpose, t.seen_at, CASE WHEN t.moved_at > now() - interval '10 seconds' THEN t.rate ELSE 0 END AS rate,
    (SELECT count(*) FROM wharf.parked k WHERE k.build = b.id AND k.partition = t.partition) AS parked,
    CASE WHEN b.state IN ('previous', 'scratch') THEN b.keep_until END AS keep_until,
    CASE WHEN b.differences IS NOT NULL THEN b.verified_at END AS verified_at, b.differences, b.topic_ids
FROM wharf.builds b JOIN wharf.tasks t ON t.build = b.id
WHERE b.state <> 'retired' AND (b.state <> 'building' OR EXISTS (SELECT FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.classid = 1464353107 AND l.objid = b.id::oid
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())));
GRANT SELECT ON wharf_read.builds TO wharf_query;
