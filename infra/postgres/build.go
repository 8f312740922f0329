package postgres

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
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
	state      string
}

const (
	building = "building"
	live     = "live"
)

func (b build) schema() string { return fmt.Sprintf("wharf_build_%d", b.id) }

// table is the build's table as SQL names it.
func (b build) table() string { return b.schema() + "." + quote(b.model) }

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
	_, err = p.Up(ctx)
	return err
}

// querier is a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// builds lists the builds of all models in that state.
func builds(ctx context.Context, db querier, state string) ([]build, error) {
	rows, err := db.Query(ctx,
		"SELECT id, model, version, partitions, topics, state FROM wharf.builds WHERE state = $1", state)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(r pgx.CollectableRow) (b build, err error) {
		err = r.Scan(&b.id, &b.model, &b.version, &b.partitions, &b.topics, &b.state)
		return b, err
	})
}

// create makes an empty build with its table. Its primary key is there only if rows are looked up by it while the build
// is filled; finish makes what is missing.
func (e *Engine) create(ctx context.Context, tx pgx.Tx, m projections.Model) (build, error) {
	b := build{model: m.Name, version: m.Version, partitions: e.Partitions, topics: m.Topics, state: building}
	err := tx.QueryRow(ctx, `INSERT INTO wharf.builds (model, version, partitions, topics, state)
		VALUES ($1, $2, $3, $4, $5) RETURNING id`, b.model, b.version, b.partitions, b.topics, b.state).Scan(&b.id)
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

func primaryKey(m projections.Model) string {
	return "PRIMARY KEY (" + columnNames(m.Columns[:m.Keys]) + ")"
}

// finish makes the indexes.
func finish(ctx context.Context, tx pgx.Tx, m projections.Model, b build) error {
	var statements []string
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

// publish makes the build the live one and points the view at it.
func publish(ctx context.Context, tx pgx.Tx, m projections.Model, b build) error {
	_, err := tx.Exec(ctx, `UPDATE wharf.builds SET state = 'retired', retired_at = now()
		WHERE model = $1 AND state = 'live'`, b.model)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, "UPDATE wharf.builds SET state = 'live', live_at = now() WHERE id = $1", b.id)
	if err != nil {
		return err
	}
	view := projections.ViewSchema + "." + quote(b.model)
	same, err := sameColumns(ctx, tx, m)
	if err != nil {
		return err
	}
	statements := []string{
		"CREATE OR REPLACE VIEW " + view + " AS SELECT " + columnNames(m.Columns) + " FROM " + b.table(),
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

// sameColumns says whether the model's view, if there is one, has the columns that it will have.
func sameColumns(ctx context.Context, tx pgx.Tx, m projections.Model) (bool, error) {
	rows, err := tx.Query(ctx, `SELECT a.attname, format_type(a.atttypid, NULL)::regtype = want.type::regtype
		FROM pg_attribute a LEFT JOIN unnest($3::text[], $4::text[]) AS want (name, type) ON want.name = a.attname
		WHERE a.attrelid = to_regclass($1 || '.' || quote_ident($2)) ORDER BY a.attnum`,
		projections.ViewSchema, m.Name, names(m), types(m))
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
	return same && slices.Equal(have, names(m)), err
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

// modelLock is the advisory lock of the model, in two numbers: who holds it may make and drop builds of it.
func modelLock(model string) (class, object int32) {
	h := fnv.New32a()
	h.Write([]byte(model))
	return lockClass, int32(h.Sum32())
}

const (
	lockClass = 0x57484152 // "WHAR"
	setupLock = 1
)

// sweep drops what nobody needs any more: builds that were retired before the grace began, and builds that were never
// finished. A model whose lock somebody holds is left for another time.
func (e *Engine) sweep(ctx context.Context) error {
	rows, err := e.pool.Query(ctx, `SELECT id, model FROM wharf.builds
		WHERE state = 'building' OR state = 'retired' AND retired_at < now() - make_interval(secs => $1)`,
		e.Grace.Seconds())
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
			class, object := modelLock(b.model)
			var ours bool
			err := tx.QueryRow(ctx, "SELECT pg_try_advisory_xact_lock($1, $2)", class, object).Scan(&ours)
			if err != nil || !ours {
				return err
			}
			return drop(ctx, tx, b)
		})
		if err != nil && !isCode(err, codeLockNotAvailable) {
			errs = append(errs, fmt.Errorf("drop build %d of %s: %w", b.id, b.model, err))
		}
	}
	return errors.Join(errs...)
}

// drop removes the build, unless it is live. No CASCADE: a view that still looks at the table must stop it.
func drop(ctx context.Context, tx pgx.Tx, b build) error {
	if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", dropLockTimeout.Milliseconds())); err != nil {
		return err
	}
	tag, err := tx.Exec(ctx, "DELETE FROM wharf.builds WHERE id = $1 AND state <> 'live'", b.id)
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

const dropLockTimeout = time.Second

// Codes of Postgres's errors.
const (
	codeMoved            = "WH001" // wharf.advance
	codeLockNotAvailable = "55P03"
)

func isCode(err error, code string) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == code
}
