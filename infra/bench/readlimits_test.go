//go:build bench

package bench_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"wharf/infra/embedded/pgtest"
	"wharf/infra/journal"
	"wharf/infra/postgres"
	"wharf/projections"
)

// written is what live projection of a log had Postgres write: every statement with its parameters, a transaction an
// entry, by partition. The limits write the same again, without a log, without decoding, without a fold.
type written struct {
	mu    sync.Mutex
	parts [partitions][]transaction
}

type transaction struct {
	advance []any // of wharf.advance
	insert  string
	columns []any // the parameters of insert, an array each
}

// capture is what live projection of the model writes.
func (l *told) capture(t *testing.T, m projections.Model) *written {
	t.Helper()
	w := &written{}
	c, err := pgxpool.ParseConfig(pgtest.TestDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	c.MaxConns = 8
	c.ConnConfig.Tracer = w
	pool, err := pgxpool.NewWithConfig(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	l.project(t, pool, m, func(c *postgres.Config) { c.Copy = math.MaxInt })
	return w
}

type batchKey struct{}

// The batches of a task begin with the new position, which says whose it is.
func (w *written) TraceBatchStart(ctx context.Context, _ *pgx.Conn, d pgx.TraceBatchStartData) context.Context {
	return context.WithValue(ctx, batchKey{}, new(transaction))
}

func (w *written) TraceBatchQuery(ctx context.Context, _ *pgx.Conn, d pgx.TraceBatchQueryData) {
	tx := ctx.Value(batchKey{}).(*transaction)
	switch {
	case strings.HasPrefix(d.SQL, "SELECT wharf.advance("):
		tx.advance = d.Args
	case strings.HasPrefix(d.SQL, "INSERT INTO "):
		tx.insert, tx.columns = d.SQL, d.Args
	}
}

func (w *written) TraceBatchEnd(ctx context.Context, _ *pgx.Conn, d pgx.TraceBatchEndData) {
	if tx := ctx.Value(batchKey{}).(*transaction); tx.advance != nil && d.Err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		p := tx.advance[1].(int32)
		w.parts[p] = append(w.parts[p], *tx)
	}
}

func (w *written) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}

func (w *written) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// upsert is how long INSERT … SELECT unnest … ON CONFLICT of the same rows and the storing of the same positions take.
func (w *written) upsert(t *testing.T, l *told, m projections.Model) time.Duration {
	t.Helper()
	pool := newDatabase(t)
	l.engine(t, pool, m) // the same table, with the same indexes
	began := time.Now()
	var group errgroup.Group
	for p, part := range w.parts {
		group.Go(func() error {
			for _, tx := range part {
				batch := &pgx.Batch{}
				batch.Queue("UPDATE wharf.tasks SET offsets = $3, seqs = $4 WHERE build = $1 AND partition = $2",
					tx.advance[0], p, tx.advance[6], tx.advance[7])
				if tx.insert != "" {
					batch.Queue(tx.insert, tx.columns...)
				}
				if err := pool.SendBatch(context.Background(), batch).Close(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	return time.Since(began)
}

// copy is how long COPY of the same rows and then the making of the same indexes take, with as many connections as there
// are processors for the one, and one for the other.
func (w *written) copy(t *testing.T, l *told, m projections.Model) time.Duration {
	t.Helper()
	pool := newDatabase(t)
	l.engine(t, pool, m)
	var indexes []string
	found, err := pool.Query(t.Context(), "SELECT indexdef FROM pg_indexes WHERE schemaname = 'wharf_build_1'")
	if err == nil {
		indexes, err = pgx.CollectRows(found, pgx.RowTo[string])
	}
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(err)
	_, err = pool.Exec(t.Context(), "CREATE TABLE raw (LIKE wharf_build_1."+m.Name+")")
	must(err)
	names := make([]string, len(m.Columns))
	for i, c := range m.Columns {
		names[i] = c.Name
	}
	var parts [partitions][][]any
	for p, part := range w.parts {
		for _, tx := range part {
			for i := range reflect.ValueOf(tx.columns[0]).Len() {
				row := make([]any, len(tx.columns))
				for c := range row {
					row[c] = reflect.ValueOf(tx.columns[c]).Index(i).Interface()
				}
				parts[p] = append(parts[p], row)
			}
		}
	}
	began := time.Now()
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for _, rows := range parts {
		group.Go(func() error {
			_, err := pool.CopyFrom(context.Background(), pgx.Identifier{"raw"}, names, pgx.CopyFromRows(rows))
			return err
		})
	}
	must(group.Wait())
	for _, index := range indexes {
		_, err := pool.Exec(t.Context(), strings.Replace(index, "wharf_build_1."+m.Name+" ", "raw ", 1))
		must(err)
	}
	return time.Since(began)
}

// rawVisible publishes records of the size of an order that was placed, and consumes them in a bare loop, which writes a
// row of each, as many as have come in a transaction. With a relay, they are published to a topic from which a bare loop publishes
// them again, as Wharf's journal is, and each is seen by a SELECT.
func rawVisible(t *testing.T, perSecond float64, relay bool) stat {
	l := tellOrders(t, 0)
	pool := newDatabase(t)
	_, err := pool.Exec(t.Context(), "CREATE TABLE raw (id text PRIMARY KEY, data json, n bigint); CREATE TABLE checkpoint (partition int PRIMARY KEY, n bigint)")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	done := map[string]chan struct{}{}
	when := func(id string) chan struct{} {
		mu.Lock()
		defer mu.Unlock()
		if done[id] == nil {
			done[id] = make(chan struct{})
		}
		return done[id]
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	for p := range int32(partitions) {
		all.Go(func() {
			err := l.source(projections.OrdersTopic).Read(ctx, p, 0, func(b journal.Batch) error {
				var ids, data []string
				for _, r := range b.Records {
					ids, data = append(ids, string(r.Key)), append(data, string(r.Value))
				}
				batch := &pgx.Batch{}
				batch.Queue("INSERT INTO raw SELECT *, 1 FROM unnest($1::text[], $2::json[]) ON CONFLICT (id) DO UPDATE SET data = EXCLUDED.data, n = raw.n + 1", ids, data)
				batch.Queue("INSERT INTO checkpoint VALUES ($1, $2) ON CONFLICT (partition) DO UPDATE SET n = EXCLUDED.n", p, b.Next)
				if err := pool.SendBatch(ctx, batch).Close(); err != nil {
					return err
				}
				for _, id := range ids {
					close(when(id))
				}
				return nil
			})
			if ctx.Err() == nil {
				t.Errorf("the bare loop: %v", err)
				cancel()
			}
		})
	}
	log := l.client.PublicLog(projections.OrdersTopic)
	if relay {
		l.broker.topics(t, l.client, "orders.relayed")
		public := log
		log = l.client.PublicLog("orders.relayed")
		for p := range int32(partitions) {
			all.Go(func() {
				_ = log.Read(ctx, p, 0, func(b journal.Batch) error { return public.AppendBatch(ctx, p, b.Records) })
			})
		}
	}
	value := placeCommand().sample.Value
	return wait(t, perSecond, func() (func() error, error) {
		id := uuid.NewString()
		data, _ := json.Marshal(string(value))
		err := log.AppendBatch(t.Context(), journal.Partition([]byte(id), partitions), []journal.Record{{Key: []byte(id), Value: data}})
		return func() error {
			select {
			case <-when(id):
				if !relay {
					return nil
				}
				var n int64
				return pool.QueryRow(t.Context(), "SELECT n FROM raw WHERE id = $1", id).Scan(&n)
			case <-time.After(time.Minute):
				return errors.New("an order was not consumed")
			}
		}, err
	})
}

// plainGet answers every GET with an order of the usual length.
var plainGet = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(sampleOrder)
})

var sampleOrder = func() projections.Order {
	var o projections.Order
	o.ID, o.Customer, o.Status, o.Version = uuid.New(), "customer 1", "delivered", 13
	for i := range items {
		o.Lines = append(o.Lines, lineOf(i))
	}
	return o
}()

// rawGet selects the columns that the query answers, by primary key, as fast as it goes.
func rawGet(t *testing.T, pool *pgxpool.Pool, callers int, ids []string) stat {
	t.Helper()
	s, err := drive(closed(callers), func(w int) error {
		id := ids[(w*7919+int(time.Now().UnixNano()>>10))%len(ids)]
		if _, err := selectOrder(t.Context(), pool, id); err != nil {
			return fmt.Errorf("order %s: %w", id, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func selectOrder(ctx context.Context, pool *pgxpool.Pool, id string) (lines []byte, err error) {
	var o projections.Order
	err = pool.QueryRow(ctx, `SELECT customer, status, reason, total, currency, payment_version, shipment_status,
		shipment_version, version, placed_at, updated_at, lines FROM wharf_read.orders WHERE id = $1`, id).Scan(&o.Customer,
		&o.Status, &o.Reason, &o.Total.Amount, &o.Total.Currency, &o.Payment.Version, &o.Shipment.Status, &o.Shipment.Version,
		&o.Version, &o.PlacedAt, &o.UpdatedAt, &lines)
	return lines, err
}

// bareGet selects an order and answers with its lines as they are stored: what both limits of a query come to in one process.
func bareGet(pool *pgxpool.Pool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		lines, err := selectOrder(r.Context(), pool, r.PathValue("id"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(lines)
	})
	return mux
}
