//go:build bench

package bench_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"wharf/commands"
	"wharf/domain/orders"
	"wharf/infra/embedded/pgtest"
	"wharf/infra/postgres"
	"wharf/infra/web"
	"wharf/projections"
)

// The read side is measured from the topics of an embedded broker, which is a process of its own, to a Postgres that is
// another, with the read models that stand for the two kinds: orders, a row an entity, and history, a row an event.
var kinds = []projections.Model{projections.Orders, projections.History}

// collectLess has garbage collected as the projector and the query service do (see cmd/wharf/program.go), for the limits too.
func collectLess(t *testing.T) {
	percent, limit := debug.SetGCPercent(400), debug.SetMemoryLimit(512<<20)
	t.Cleanup(func() { debug.SetGCPercent(percent); debug.SetMemoryLimit(limit) })
}

func newDatabase(t *testing.T) *pgxpool.Pool {
	t.Helper()
	pool, err := postgres.Open(t.Context(), pgtest.TestDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// engine is one that is set up on the log, with one read model.
func (l *told) engine(t *testing.T, pool *pgxpool.Pool, m projections.Model, adjust ...func(*postgres.Config)) *postgres.Engine {
	t.Helper()
	quiet := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	c := postgres.Config{Source: l.source, Partitions: partitions, Models: []projections.Model{m}, Logger: quiet}
	for _, a := range adjust {
		a(&c)
	}
	e := postgres.New(pool, c)
	if err := e.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	return e
}

// start runs the engine in all partitions.
func start(t *testing.T, e *postgres.Engine) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		err := e.Run(ctx, func(ctx context.Context, _ string, _ []string, owned func(context.Context, int32)) error {
			var tasks sync.WaitGroup
			for p := range int32(partitions) {
				tasks.Go(func() { owned(ctx, p) })
			}
			tasks.Wait()
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	return func() { cancel(); all.Wait() }
}

// project is how long live projection of the whole log takes.
func (l *told) project(t *testing.T, pool *pgxpool.Pool, m projections.Model, adjust ...func(*postgres.Config)) time.Duration {
	t.Helper()
	e := l.engine(t, pool, m, adjust...)
	began := time.Now()
	stop := start(t, e)
	defer stop()
	for want := l.events(m); ; time.Sleep(5 * time.Millisecond) {
		var seen int64
		err := pool.QueryRow(t.Context(), "SELECT sum(s)::bigint FROM wharf.tasks, unnest(seqs) s").Scan(&seen)
		if err != nil {
			t.Fatal(err)
		}
		if seen == want {
			return time.Since(began)
		}
	}
}

// replay is how long a replay takes to fill the new build, and how long until it is swapped in, verified.
func (l *told) replay(t *testing.T, pool *pgxpool.Pool, m projections.Model) (filled, all time.Duration) {
	t.Helper()
	defer debug.SetGCPercent(debug.SetGCPercent(200)) // as `wharf replay` does, with --parallel for all processors
	e := l.engine(t, pool, m, func(c *postgres.Config) { c.Parallel = runtime.GOMAXPROCS(0) })
	began := time.Now()
	err := e.Replay(t.Context(), []string{m.Name}, postgres.ReplayOptions{}, func(p postgres.Progress) {
		if p.Phase == postgres.PhaseVerifying && filled == 0 {
			filled = time.Since(began)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return filled, time.Since(began)
}

// round takes a measure as often as it is to be taken. What a round has started ends with it.
func round(t *testing.T, measure func(t *testing.T)) {
	for i := range *rounds {
		t.Run(fmt.Sprintf("round %d", i+1), measure)
	}
}

func rate(n int64, took time.Duration) float64 { return float64(n) / took.Seconds() }

// logs are those that projection is measured with.
func logs(t *testing.T) []*told {
	all := []*told{tellOrders(t, *readOrders)}
	if *invoices != "" {
		all = append(all, tellFile(t, *invoices))
	}
	return all
}

// limits is how fast what live projection writes can be written, in events/s: by INSERT, and by COPY if the model's rows are
// written once. What they write is not kept: it would be in the way of what is measured next.
func (l *told) limits(t *testing.T, m projections.Model) (raw, copied float64) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(math.MaxInt64)) // it is much
	n, rows := l.events(m), l.capture(t, m)
	runtime.GC()
	raw = rate(n, rows.upsert(t, l, m))
	if m.Append {
		runtime.GC()
		copied = rate(n, rows.copy(t, l, m))
	}
	return raw, copied
}

// TestProjection measures how fast read models take in a log: live, from nothing, and in a replay beside that.
func TestProjection(t *testing.T) {
	collectLess(t)
	peers := runPeers(t)
	for _, l := range logs(t) {
		for _, m := range kinds {
			what := fmt.Sprintf("%s of %s", m.Name, l.name)
			n := l.events(m)
			round(t, func(t *testing.T) {
				raw, copied := l.limits(t, m)
				runtime.GC()
				pool := newDatabase(t)
				live := rate(n, l.project(t, pool, m))
				results.add(row{measure: "live, " + what + ": events/s", least: 0.70}, live, raw)
				read := rate(n, l.consume(t, m))
				results.add(row{measure: "live, " + what + ": beside reading it, and writing raw"}, live, 1/(1/read+1/raw))
				runtime.GC()
				fill, all := l.replay(t, pool, m)
				filled, swapped := rate(n, fill), rate(n, all)
				if m.Append {
					results.add(row{measure: "replay, " + what + ": events/s, beside COPY", least: 0.60}, filled, copied)
					results.add(row{measure: "replay, " + what + ": beside reading it, and COPY"}, filled, 1/(1/read+1/copied))
				} else {
					results.add(row{measure: "replay, " + what + ": events/s, beside live", least: 3}, filled, live)
				}
				results.add(row{measure: "replay, " + what + ": with verification and swap"}, swapped, filled)
				if p := peers["project_live"]; p.rate > 0 && !m.Append {
					results.add(row{measure: "live, " + what + ": beside the best framework", least: 1.5}, live, p.rate)
				}
				if p := peers["rebuild"]; p.rate > 0 && !m.Append {
					results.add(row{measure: "replay, " + what + ": beside the best framework", least: 2}, filled, p.rate)
				}
			})
		}
	}
}

// TestScale measures whether replay stays as fast and as small when the log grows.
func TestScale(t *testing.T) {
	collectLess(t)
	first := map[string]float64{}
	for text := range strings.SplitSeq(*sizes, ",") {
		size, err := strconv.Atoi(text)
		if err != nil || size < 1000 {
			t.Fatal("-sizes: expected numbers of events with commas between")
		}
		l := tellOrders(t, max(1, size/(12+2*items)))
		for _, m := range kinds {
			pool := newDatabase(t)
			l.project(t, pool, m) // what the replay is compared with
			runtime.GC()
			peak := watchHeap()
			fill, _ := l.replay(t, pool, m)
			heap := peak()
			r := rate(l.events(m), fill)
			if first[m.Name] == 0 {
				first[m.Name] = r
			}
			what := fmt.Sprintf("replay of %s, a log of %d events", m.Name, l.events(m))
			results.add(row{measure: what + ": events/s", least: 0.67}, r, first[m.Name])
			results.add(row{measure: what + ": heap at most, MiB"}, heap, math.NaN())
		}
	}
}

// watchHeap is the largest heap, in MiB, from now until it is asked.
func watchHeap() (peak func() float64) {
	done, most := make(chan struct{}), make(chan uint64)
	go func() {
		var largest uint64
		for tick := time.NewTicker(20 * time.Millisecond); ; {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			largest = max(largest, m.HeapInuse)
			select {
			case <-done:
				most <- largest
				return
			case <-tick.C:
			}
		}
	}()
	return func() float64 { close(done); return float64(<-most) / (1 << 20) }
}

// TestVisible measures how long it takes from the answer to a command until a query sees what it did, at a rate.
func TestVisible(t *testing.T) {
	collectLess(t)
	peer := runPeers(t)["project_live_delay"]
	for _, perSecond := range []float64{200, 1000} {
		round(t, func(t *testing.T) {
			raw := rawVisible(t, perSecond, false)
			relayed := rawVisible(t, perSecond, true)
			own := visible(t, perSecond)
			results.add(row{measure: fmt.Sprintf("command to query at %.0f/s: p50, ms", perSecond)}, own.p50, raw.p50)
			results.add(row{measure: fmt.Sprintf("command to query at %.0f/s: p99, ms", perSecond), most: 2}, own.p99, raw.p99)
			results.add(row{measure: fmt.Sprintf("  the bare loop behind a relay, with a SELECT, at %.0f/s: p50, ms", perSecond)}, relayed.p50, raw.p50)
			results.add(row{measure: fmt.Sprintf("  the bare loop behind a relay, with a SELECT, at %.0f/s: p99, ms", perSecond)}, relayed.p99, raw.p99)
			if peer.p99 > 0 && perSecond == peer.rate {
				results.add(row{measure: "command to query at 200/s: p50, ms, beside the best framework", most: 1}, own.p50, peer.p50)
				results.add(row{measure: "command to query at 200/s: p99, ms, beside the best framework", most: 1}, own.p99, peer.p99)
			}
		})
	}
}

// visible has orders placed at a journal, and waits for each in the read model.
func visible(t *testing.T, perSecond float64) stat {
	l := tellOrders(t, 0)
	l.broker.topics(t, l.client, "orders.journal")
	j, stop := replica[orders.Order](t, l.client, "orders", orders.Events, true)
	defer stop()
	pool := newDatabase(t)
	defer start(t, l.engine(t, pool, projections.Orders))()
	positions := postgres.NewPositions(pool)
	return wait(t, perSecond, func() (func() error, error) {
		id := uuid.NewString()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		r, err := j.Handle(ctx, commands.Command{Stream: id, Key: id, Request: id, IfMatch: commands.AnyVersion}, placed)
		return func() error { return positions.Wait(t.Context(), "orders", r.Position, time.Minute) }, err
	})
}

// wait measures the second half of an operation alone.
func wait(t *testing.T, perSecond float64, do func() (then func() error, err error)) stat {
	t.Helper()
	var mu sync.Mutex
	var took []time.Duration
	from := time.Now().Add(warms())
	_, err := drive(open(perSecond), func(int) error {
		then, err := do()
		if err != nil {
			return err
		}
		began := time.Now()
		if err := then(); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if began.After(from) {
			took = append(took, time.Since(began))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return statOf(len(took), runs(), took)
}

// TestQueryByID measures GET /orders/{id}, with nothing else going on and during a replay.
func TestQueryByID(t *testing.T) {
	collectLess(t)
	l := tellOrders(t, *readOrders)
	pool := newDatabase(t)
	l.project(t, pool, projections.Orders)
	var ids []string
	for range 1000 {
		ids = append(ids, l.orders[rand.IntN(len(l.orders))].String())
	}
	query := queryPool(t, pool)
	api := l.api(t, query)
	wharf := filepath.Join(t.TempDir(), "wharf")
	if out, err := exec.Command("go", "build", "-o", wharf, "../../cmd/wharf").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for range *rounds {
		for _, n := range []int{16, busy} {
			c := client{Callers: n, Orders: ids}
			own := serveFor(t, api, c)
			plain := serveFor(t, plainGet, c)
			raw := rawGet(t, query, n, ids)
			bare := serveFor(t, bareGet(query), c)
			limit := 1 / (1/plain.rate + 1/raw.rate)
			results.add(row{measure: "GET /orders/{id}/s, beside plain GET and SELECT", callers: n, least: 0.70}, own.rate, limit)
			results.add(row{measure: "  the SELECT in a bare handler/s, beside the same", callers: n}, bare.rate, limit)
		}
		// At a rate that leaves room, or else a replay could only be paid for by queries.
		c := client{Callers: openCallers, Rate: 500, Orders: ids}
		calm := serveFor(t, api, c)
		ctx, enough := context.WithCancel(t.Context())
		var replays atomic.Int64
		var replaying sync.WaitGroup
		replaying.Go(func() {
			for ctx.Err() == nil {
				out, err := l.command(ctx, wharf, pool, "replay", "orders").CombinedOutput()
				if err == nil {
					replays.Add(1)
				} else if ctx.Err() == nil {
					t.Errorf("wharf replay: %v: %s", err, out)
					return
				}
			}
		})
		busy := serveFor(t, api, c)
		enough()
		replaying.Wait()
		t.Logf("%d replays of %d events came to an end meanwhile", replays.Load(), l.events(projections.Orders))
		results.add(row{measure: "GET /orders/{id} at 500/s during a replay: p50, ms, beside without"}, busy.p50, calm.p50)
		results.add(row{measure: "GET /orders/{id} at 500/s during a replay: p99, ms, beside without", most: 2}, busy.p99, calm.p99)
	}
}

// command runs the program on the log and the database.
func (l *told) command(ctx context.Context, wharf string, pool *pgxpool.Pool, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, wharf, args...)
	c.Env = append(os.Environ(), "WHARF_KAFKA_BROKERS="+strings.Join(l.broker.addrs, ","),
		"WHARF_DATABASE_URL="+pool.Config().ConnString(), fmt.Sprintf("WHARF_PARTITIONS=%d", partitions))
	return c
}

// queryPool is like the query service's.
func queryPool(t *testing.T, owner *pgxpool.Pool) *pgxpool.Pool {
	t.Helper()
	pool, err := postgres.OpenQuery(t.Context(), owner.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// api is the query service's.
func (l *told) api(t *testing.T, pool *pgxpool.Pool) http.Handler {
	t.Helper()
	register := func(a huma.API) {
		projections.Register(a, projections.Reads{DB: pool, Positions: postgres.NewPositions(pool)})
	}
	document, err := web.Document(register)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	register(web.NewAPI(mux))
	return web.Handler(mux, document, "bench", func() error { return nil })
}

// runPeers is what the best framework does, by measure, if there is a command that runs frameworks. They run once.
func runPeers(t *testing.T) map[string]stat {
	if *peers == "" {
		return nil
	}
	best, err := askPeers()
	if err != nil {
		t.Fatalf("-peers: %v", err)
	}
	return best
}

var askPeers = sync.OnceValues(func() (map[string]stat, error) {
	c := exec.Command("sh", "-c", *peers)
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		return nil, err
	}
	best := map[string]stat{}
	for line := range strings.Lines(string(out)) {
		var p struct {
			Measure string
			Rate    float64 `json:"rate_per_s"`
			P50     float64 `json:"p50_ms"`
			P99     float64 `json:"p99_ms"`
		}
		if err := json.Unmarshal([]byte(line), &p); err != nil {
			return nil, fmt.Errorf("it printed %q: %w", line, err)
		}
		fmt.Print(line)
		switch b, known := best[p.Measure]; {
		case strings.HasSuffix(p.Measure, "_delay"): // all at one rate, and the quickest is the best
			if !known || p.P99 < b.p99 {
				best[p.Measure] = stat{math.Round(p.Rate), p.P50, p.P99}
			}
		case p.Rate > b.rate:
			best[p.Measure] = stat{p.Rate, p.P50, p.P99}
		}
	}
	return best, nil
})
