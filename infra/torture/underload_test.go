//go:build torture && linux

package torture_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"wharf/projections"
)

// TestReplaysUnderLoad is a shop in full work while its read models are built anew, taken back and verified, and the
// projectors and the replays are killed in the middle. Nobody else is: so no query may fail, no answer may be stale to
// the token of the order that it asks for, and nothing may differ.
func TestReplaysUnderLoad(t *testing.T) {
	r, kafka := newRun(t)
	projectors := slices.DeleteFunc(slices.Clone(r.victims), func(v *victim) bool { return v.kind != "projector" })
	r.tormentor = r.tormentorOf(projectors, 6*time.Second, 2*time.Second)
	began := time.Now()
	loading, loaded := context.WithCancel(t.Context())
	defer loaded()
	var all errgroup.Group
	var report map[string]float64
	all.Go(func() error {
		defer loaded()
		args := []string{"load", "--url", r.url, "--stock", "200", "--read-back", "--json"}
		if *invoices == "" {
			args = append(args, "--orders", "300", "--concurrency", "8")
		} else {
			args = append(args, "--file", *invoices, "--orders", strconv.Itoa(*orders))
		}
		out, err := r.command(t.Context(), args...)
		if err != nil {
			return err
		}
		return json.Unmarshal(out, &report)
	})
	queries := &queries{run: r}
	all.Go(func() error { return r.tormentor.run(loading) })
	all.Go(func() error { queries.ask(loading); return nil })
	all.Go(func() error { return r.replayer.everything(loading) })
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	p := r.replayer
	if p.killed.Load() == 0 || len(r.tormentor.done) == 0 || queries.asked.Load() < 100 {
		t.Errorf("too little was done to say anything: the load was too small")
	}
	t.Logf("under load: %d replays of everything, %d rollbacks, %d verifications, and %d that were killed; once more after it",
		p.replays.Load(), p.rollbacks.Load(), p.verified.Load(), p.killed.Load())
	for _, args := range everything() { // what never came to its end under load does now
		p.job(t.Context(), t.Context(), args, r.clients.find)
	}
	rows, events, err := r.replayer.verify(t.Context())
	if err != nil {
		t.Error(err)
	}
	if broken, _, err := r.audit(t.Context()); err != nil || broken > 0 {
		t.Errorf("the audit found %d invariants broken: %v", broken, err)
	}
	final := report["delivered"] + report["cancelled"] + report["rejected"] + report["expired"]
	if report["placed"] == 0 || final != report["placed"] || report["read_back"] != report["placed"] || report["stale_reads"] > 0 {
		t.Errorf("the load: %v", report)
	}
	if p.differences.Load() > 0 || p.failed.Load() > 0 || queries.failed.Load() > 0 {
		t.Errorf("found:\n%s", strings.Join(r.clients.findings, "\n"))
	}
	var b strings.Builder
	row := func(name string, value any) { fmt.Fprintf(&b, "%-36s %12v\n", name, value) }
	row("broker", kafka)
	row("minutes", fmt.Sprintf("%.1f", took.Minutes()))
	row("orders placed and final", final)
	row("orders read with their token", report["read_back"])
	row("  answers that did not know them", report["stale_reads"])
	row("commands/s", fmt.Sprintf("%.0f", report["commands_per_s"]))
	row("other queries", queries.asked.Load())
	row("  failed", queries.failed.Load())
	row("  slowest, ms", queries.slowest.Load())
	row("projectors killed, paused, restarted", r.tormentor.count())
	t.Logf("\n%s", b.String()+p.table(rows, events))
}

func (t *tormentor) count() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	did := t.done["projector"]
	return fmt.Sprint(did[kill], ", ", did[pause], ", ", did[restart])
}

// everything replays all read models, takes each back, and verifies all, over and over. Some of the programs are killed in
// the middle.
func (p *replayer) everything(ctx context.Context) error {
	for ctx.Err() == nil {
		for i, args := range everything() {
			limit, cancel := context.WithCancel(ctx)
			if rand.IntN(4) < 1 || i == 0 && p.killed.Load() == 0 { // at least one, of what takes longest
				limit, cancel = context.WithTimeout(ctx, rand.N(2*time.Second))
			}
			p.job(ctx, limit, args, p.run.clients.find)
			cancel()
			sleep(ctx, time.Second)
		}
	}
	return nil
}

func everything() (jobs [][]string) {
	jobs = [][]string{{"replay", "--all"}}
	for _, m := range projections.All {
		jobs = append(jobs, []string{"replay", "--rollback", m.Name})
	}
	return append(jobs, []string{"verify"})
}

// queries asks for rows, all the time, and counts what is no good answer. (What an order's history is asked for without a
// token may be behind what the order is; /projections asks Kafka as well.)
type queries struct {
	run *run

	asked, failed, slowest atomic.Int64
	seen                   sync.Map // paths of lists that were not empty once: orders and stock never are again
}

const askers = 4

func (q *queries) ask(ctx context.Context) {
	paths := []string{"/orders?limit=20", "/orders?status=delivered&limit=5", "/stock?limit=50", "/shipments?limit=20",
		"/sales", "/ledger"}
	client := &http.Client{Transport: transport(time.Minute), Timeout: time.Minute}
	var all sync.WaitGroup
	for range askers {
		all.Go(func() {
			for ctx.Err() == nil {
				path := paths[rand.IntN(len(paths))]
				began := time.Now()
				items, err := q.get(client, path)
				q.asked.Add(1)
				took := time.Since(began).Milliseconds()
				for most := q.slowest.Load(); took > most && !q.slowest.CompareAndSwap(most, took); most = q.slowest.Load() {
				}
				if err == nil && strings.HasPrefix(path, "/orders") && len(items) > 0 {
					id := items[rand.IntN(len(items))].ID
					_, err = q.get(client, "/orders/"+id)
					q.asked.Add(1)
				}
				if err != nil {
					q.failed.Add(1)
					q.run.clients.find("%v", err)
				}
				sleep(ctx, 10*time.Millisecond)
			}
		})
	}
	all.Wait()
}

func (q *queries) get(client *http.Client, path string) (items []struct{ ID string }, err error) {
	resp, err := client.Get(q.run.url + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, resp.Status, body)
	}
	var list struct{ Items []struct{ ID string } }
	if err != nil || json.Unmarshal(body, &list) != nil {
		return nil, err
	}
	if len(list.Items) > 0 {
		q.seen.Store(path, true)
	} else if _, was := q.seen.Load(path); was {
		err = fmt.Errorf("GET %s: nothing is there any more: %s", path, body)
	}
	return list.Items, err
}
