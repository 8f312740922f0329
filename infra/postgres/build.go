package postgres

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"wharf/projections"
)

// build is one making of a read model's table.
type build struct {
	id         int64
	model      string
	version    int
	partitions int
	topics     []string
	topicIDs   []string // in their order; empty where it is not known
	state      string

	verified    *time.Time
	differences *int64 // that were found then
}

// The states of a build. It begins as building, under a lock of whoever makes it. The live one is what queries read;
// the one that was live before it is previous: it is kept up to date for a while, so that it can be live again. A scratch
// build is for people to look at. A retired one is only kept for the queries that are still at it.
const (
	building = "building"
	live     = "live"
	previous = "previous"
	scratch  = "scratch"
	retired  = "retired"
)

func (b build) schema() string { return fmt.Sprintf("wharf_build_%d", b.id) }

// table is the build's table as SQL names it.
func (b build) table() string { return b.schema() + "." + quote(b.model) }

// hasTable is false when somebody has dropped the build's table.
func (b build) hasTable(ctx context.Context, db querier) (bool, error) {
	rows, err := db.Query(ctx, "SELECT to_regclass($1) IS NOT NULL", b.table())
	if err != nil {
		return false, err
	}
	return pgx.CollectExactlyOneRow(rows, pgx.RowTo[bool])
}

// Table is the table of a build of the read model, as SQL names it.
func Table(model string, id int64) string { return build{id: id, model: model}.table() }

// viewOf is the view of the read model, which shows its live build.
func viewOf(model string) string { return projections.ViewSchema + "." + quote(model) }

func quote(name string) string { return pgx.Identifier{name}.Sanitize() }

func columnNames(columns []projections.Column) string {
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = quote(c.Name)
	}
	return strings.Join(names, ", ")
}

//go:embed migrations/*.sql
var migrations embed.FS

// migrate brings the engine's own tables up to date. The caller keeps others from doing so at the same time.
func (e *Engine) migrate(ctx context.Context) error {
	if _, err := e.pool.Exec(ctx, "CREATE SCHEMA IF NOT EXISTS wharf"); err != nil {
		return err
	}
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	db := stdlib.OpenDBFromPool(e.pool)
	defer db.Close() // the pool stays open
	p, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithTableName("wharf.migrations"),
		goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return err
	}
	for retry := (backoff{}); ; {
		_, err = p.Up(ctx)
		// A long query, or a comparison, is at what is to be changed.
		busy := isCode(err, codeLockNotAvailable) || isCode(err, codeDeadlock)
		if !busy || retry.tries == swapTries || !retry.sleep(ctx) {
			return err
		}
		if retry.tries == 4 {
			e.Logger.Warn("the engine's tables are in use and cannot be brought up to date yet: it is tried again", "err", err)
		}
	}
}

// querier is a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// builds lists the builds of all models in one of the states; a live one comes before the previous one.
func builds(ctx context.Context, db querier, states ...string) ([]build, error) {
	rows, err := db.Query(ctx,
		`SELECT id, model, version, partitions, topics, topic_ids, state, verified_at, differences FROM wharf.builds
		WHERE state = ANY($1) ORDER BY model, state`, states)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(r pgx.CollectableRow) (b build, err error) {
		err = r.Scan(&b.id, &b.model, &b.version, &b.partitions, &b.topics, &b.topicIDs, &b.state, &b.verified, &b.differences)
		return b, err
	})
}

// of is the build of the model among these, if there is one.
func of(all []build, model string) (b build, found bool) {
	i := slices.IndexFunc(all, func(b build) bool { return b.model == model })
	if i < 0 {
		return b, false
	}
	return all[i], true
}

// buildIn is the build that has the role, if there is one.
func buildIn(ctx context.Context, db querier, as role) (b build, found bool, err error) {
	all, err := builds(ctx, db, as.state)
	if err != nil {
		return b, false, err
	}
	b, found = of(all, as.model)
	return b, found, nil
}

// create makes an empty build with its table. Its primary key is there only if rows are looked up by it while the build
// is filled; finish makes what is missing.
func (e *Engine) create(ctx context.Context, tx pgx.Tx, m projections.Model, purpose string) (build, error) {
	b := build{model: m.Name, version: m.Version, partitions: e.Partitions, topics: m.Topics, topicIDs: e.idsOf(m.Topics), state: building}
	err := tx.QueryRow(ctx, `INSERT INTO wharf.builds (model, version, partitions, topics, topic_ids, state, purpose)
		VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id`, b.model, b.version, b.partitions, b.topics, b.topicIDs, b.state, purpose).Scan(&b.id)
	if err != nil {
		return b, err
	}
	var columns []string
	for _, c := range m.Columns {
		columns = append(columns, quote(c.Name)+" "+c.Type+" NOT NULL")
	}
	if !m.Append {
		columns = append(columns, primaryKey(m))
	}
	for _, sql := range []string{
		"CREATE SCHEMA " + b.schema(),
		"CREATE TABLE " + b.table() + " (" + strings.Join(columns, ", ") + ")",
	} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return b, err
		}
	}
	_, err = tx.Exec(ctx, `INSERT INTO wharf.tasks (build, partition, offsets, seqs)
		SELECT $1, p, array_fill(0, ARRAY[$2::int]), array_fill(0, ARRAY[$2::int]) FROM generate_series(0, $3 - 1) p`,
		b.id, len(b.topics), b.partitions)
	return b, err
}

// idsOf is the ids of the topics, if they are known.
func (e *Engine) idsOf(topics []string) []string {
	ids := make([]string, len(topics))
	for i, topic := range topics {
		ids[i] = e.TopicIDs[topic]
	}
	if slices.Equal(ids, make([]string, len(topics))) {
		return []string{}
	}
	return ids
}

// ids are those of the topics that the build was made of.
func (b build) ids() map[string]string {
	ids := map[string]string{}
	for i, id := range b.topicIDs {
		ids[b.topics[i]] = id
	}
	return ids
}

// isOther says that the build was made of another topic than the one that has its name now.
func (b build) isOther(topic int, ids map[string]string) bool {
	if topic >= len(b.topicIDs) {
		return false
	}
	return projections.IsAnother(b.topicIDs[topic], ids[b.topics[topic]])
}

// errOtherLog is an error of the observer as much as of the build: it is not written down where others would take it for theirs.
var errOtherLog = errors.New("this is another Kafka, or the topic was made anew")

// ofThisLog is an error if the build was made of other topics than there are now: nothing that it knows of them is true any more.
func (e *Engine) ofThisLog(b build) error {
	for i, topic := range b.topics {
		if b.isOther(i, e.TopicIDs) {
			return fmt.Errorf("build %d was made of another topic %s than there is now (id %s, and now %s): %w. Use the right one, restore it, or "+
				"build of what there is (wharf replay --force) and start again whatever was started before", b.id, topic, b.topicIDs[i], e.TopicIDs[topic], errOtherLog)
		}
	}
	return nil
}

func primaryKey(m projections.Model) string {
	return "PRIMARY KEY (" + columnNames(m.Columns[:m.Keys]) + ")"
}

// finish makes the indexes.
func finish(ctx context.Context, tx pgx.Tx, m projections.Model, b build) error {
	statements := []string{"SET LOCAL max_parallel_maintenance_workers = 0"} // other processors are left to queries
	if m.Append {
		statements = append(statements, "ALTER TABLE "+b.table()+" ADD "+primaryKey(m))
	}
	for _, columns := range m.Indexes {
		statements = append(statements, "CREATE INDEX ON "+b.table()+" ("+columns+")")
	}
	statements = append(statements, "ANALYZE "+b.table())
	for _, sql := range statements {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// publish makes the build the live one and points the view at it. The one that was live is the previous one now.
func (e *Engine) publish(ctx context.Context, tx pgx.Tx, m projections.Model, b build) error {
	batch := &pgx.Batch{}
	batch.Queue(`UPDATE wharf.builds SET state = 'retired', keep_until = now() + make_interval(secs => $3)
		WHERE model = $1 AND state = 'previous' AND id <> $2`, b.model, b.id, e.Grace.Seconds())
	batch.Queue(`UPDATE wharf.builds SET state = 'building' WHERE id = $1`, b.id) // makes room for the other
	batch.Queue(`UPDATE wharf.builds SET state = 'previous', keep_until = now() + make_interval(secs => $2)
		WHERE model = $1 AND state = 'live'`, b.model, e.Keep.Seconds())
	batch.Queue("UPDATE wharf.builds SET state = 'live', live_at = now() WHERE id = $1", b.id)
	// A task of the build that was live may wait for this transaction, and has looked at the build's state before: what it
	// looks at again is its own row, if that has changed.
	batch.Queue(`UPDATE wharf.tasks SET epoch = epoch + 1
		WHERE build = (SELECT id FROM wharf.builds WHERE model = $1 AND state = 'previous')`, b.model)
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return err
	}
	return point(ctx, tx, m, b)
}

// stale is the column that views have beside those of the model: events that this row should hold are parked.
const stale = "stale"

// point makes the model's view show the build.
func point(ctx context.Context, tx pgx.Tx, m projections.Model, b build) error {
	view := viewOf(b.model)
	same, err := sameColumns(ctx, tx, m)
	if err != nil {
		return err
	}
	waits := "true" // its queries add up all rows, and the one that misses an event may not even be there
	if m.Stream != "" {
		waits = "k.keys @> ARRAY[" + shortSQL("r."+quote(m.Stream)+"::text") + "]"
	}
	statements := []string{
		fmt.Sprintf("CREATE OR REPLACE VIEW %s AS SELECT %s, EXISTS (SELECT FROM wharf.parked k WHERE k.build = %d AND %s) AS %s FROM %s r",
			view, columnNames(m.Columns), b.id, waits, stale, b.table()),
		"GRANT SELECT ON " + view + " TO " + QueryRole,
	}
	if !same {
		statements = append([]string{"DROP VIEW IF EXISTS " + view}, statements...)
	}
	for _, sql := range statements {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// repoint gives the live build's view the columns that this program's queries need, if it lacks some. A build of another
// version keeps its columns, which are its own program's.
func (e *Engine) repoint(ctx context.Context, conn *pgxpool.Conn, m projections.Model, b build) error {
	for retry := (backoff{}); ; {
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if err := setLockTimeout(ctx, tx, swapLock); err != nil {
				return err
			}
			if b.version == m.Version {
				same, err := sameColumns(ctx, tx, m)
				if err != nil || same {
					return err
				}
				return point(ctx, tx, m, b)
			}
			return addStale(ctx, tx, b)
		})
		if !isCode(err, codeLockNotAvailable) || retry.tries == swapTries || !retry.sleep(ctx) {
			return err
		}
	}
}

// addStale appends the column to the view of a build whose columns this program does not know.
func addStale(ctx context.Context, tx pgx.Tx, b build) error {
	rows, err := tx.Query(ctx, `SELECT attname FROM pg_attribute
		WHERE attrelid = to_regclass($1 || '.' || quote_ident($2)) AND attnum > 0 AND NOT attisdropped ORDER BY attnum`,
		projections.ViewSchema, b.model)
	if err != nil {
		return err
	}
	columns, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(columns) == 0 || slices.Contains(columns, stale) {
		return err
	}
	for i, c := range columns {
		columns[i] = quote(c)
	}
	_, err = tx.Exec(ctx, fmt.Sprintf("CREATE OR REPLACE VIEW %s AS SELECT %s, false AS %s FROM %s",
		viewOf(b.model), strings.Join(columns, ", "), stale, b.table()))
	return err
}

// setLockTimeout bounds how long the transaction waits for a lock, and so how long others queue up behind it.
func setLockTimeout(ctx context.Context, tx pgx.Tx, d time.Duration) error {
	_, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", d.Milliseconds()))
	return err
}

// sameColumns says whether the model's view, if there is one, has the columns that it will have.
func sameColumns(ctx context.Context, tx pgx.Tx, m projections.Model) (bool, error) {
	rows, err := tx.Query(ctx, `SELECT a.attname, format_type(a.atttypid, NULL)::regtype = want.type::regtype
		FROM pg_attribute a LEFT JOIN unnest($3::text[], $4::text[]) AS want (name, type) ON want.name = a.attname
		WHERE a.attrelid = to_regclass($1 || '.' || quote_ident($2)) ORDER BY a.attnum`,
		projections.ViewSchema, m.Name, append(names(m), stale), append(types(m), "boolean"))
	if err != nil {
		return false, err
	}
	var have []string
	same := true
	var column string
	var alike *bool
	_, err = pgx.ForEachRow(rows, []any{&column, &alike}, func() error {
		have = append(have, column)
		same = same && alike != nil && *alike
		return nil
	})
	return same && slices.Equal(have, append(names(m), stale)), err
}

func names(m projections.Model) (list []string) {
	for _, c := range m.Columns {
		list = append(list, c.Name)
	}
	return list
}

func types(m projections.Model) (list []string) {
	for _, c := range m.Columns {
		list = append(list, c.Type)
	}
	return list
}

// modelLock is the advisory lock of the model, in two numbers: who holds it may swap a build of it in.
func modelLock(model string) (class, object int32) {
	h := fnv.New32a()
	h.Write([]byte(model))
	return lockClass, int32(h.Sum32())
}

// The classes of advisory locks: of models and the engine's own, and of builds in the making, by id.
const (
	lockClass = 0x57484152    // "WHAR"
	buildLock = lockClass + 1 // which the view wharf_read.builds knows, too

	setupLock  = 1
	verifyLock = 2
)

// whoami is this program, for people who have to wait for it: the name of a session that holds locks.
var whoami = func() string {
	host, _ := os.Hostname()
	name := fmt.Sprintf("%s, process %d on %s", strings.Join(append([]string{filepath.Base(os.Args[0])}, subcommand()...), " "), os.Getpid(), host)
	return name[:min(len(name), 63)] // Postgres cuts it there
}()

func subcommand() []string {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
		return os.Args[1:2]
	}
	return nil
}

// The purposes of builds in the making.
const (
	forReplay  = "replay"
	forLooking = "looking" // a verification, or people
)

// disposable is what sweep may drop: what was kept for long enough, and what was never finished.
const disposable = "(state = 'building' OR state IN ('scratch', 'retired') AND keep_until < now())"

// sweep drops what nobody needs any more. A build that somebody is making is left alone. A previous one retires first, so that
// no task of it is at work, and in the way of the live one's, when it is dropped.
func (e *Engine) sweep(ctx context.Context) error {
	_, err := e.pool.Exec(ctx, `UPDATE wharf.builds SET state = 'retired', keep_until = now() + make_interval(secs => $1)
		WHERE state = 'previous' AND keep_until < now()`, e.Grace.Seconds())
	if err != nil {
		return err
	}
	rows, err := e.pool.Query(ctx, "SELECT id, model FROM wharf.builds WHERE "+disposable)
	if err != nil {
		return err
	}
	old, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (b build, err error) {
		err = r.Scan(&b.id, &b.model)
		return b, err
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range old {
		err := pgx.BeginFunc(ctx, e.pool, func(tx pgx.Tx) error {
			var ours bool
			err := tx.QueryRow(ctx, "SELECT pg_try_advisory_xact_lock($1, $2)", buildLock, int32(b.id)).Scan(&ours)
			if err != nil || !ours {
				return err
			}
			return drop(ctx, tx, b, disposable)
		})
		if err != nil && !isCode(err, codeLockNotAvailable) {
			errs = append(errs, fmt.Errorf("drop build %d of %s: %w", b.id, b.model, err))
		}
	}
	return errors.Join(errs...)
}

// drop removes the build, if the condition holds. No CASCADE: a view that still looks at the table must stop it.
func drop(ctx context.Context, tx pgx.Tx, b build, condition string) error {
	if err := setLockTimeout(ctx, tx, dropLockTimeout); err != nil {
		return err
	}
	tag, err := tx.Exec(ctx, "DELETE FROM wharf.builds WHERE id = $1 AND "+condition, b.id)
	if err != nil || tag.RowsAffected() == 0 {
		return err
	}
	for _, sql := range []string{"DROP TABLE IF EXISTS " + b.table(), "DROP SCHEMA IF EXISTS " + b.schema()} {
		if _, err := tx.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

const dropLockTimeout = 3 * time.Second // longer than a vacuum takes to give way

// Codes of Postgres's errors.
const (
	codeMoved            = "WH001" // wharf.advance
	codeLockNotAvailable = "55P03"
	codeDeadlock         = "40P01"
	codeUndefinedColumn  = "42703"
)

func isCode(err error, code string) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == code
}
