//go:build torture && linux

// Package torture_test answers the question "what is left of the promises when processes die at any moment?". It runs
// with `make torture`, on Linux: the whole shop as processes, two replicas of each service, on a real Postgres and a
// real Apache Kafka (or the embedded broker, where Java or Maven is missing). Under load it kills, pauses and restarts
// them at random, Postgres and the broker included. After every round the shop has to come to rest with every
// acknowledged command in it exactly once; in the end it is audited.
//
// Read this file first: a run from its start to its table. Then clients_test.go (the commands that are counted, and how),
// faults_test.go (what is done to whom), processes_test.go and shop_test.go (the shop that suffers it).
package torture_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"wharf/infra/shop"
)

var (
	rounds  = flag.Int("rounds", 2, "how many rounds; 10 and more are long ones, with pauses of up to a minute")
	seed    = flag.Uint64("seed", 0, "decides what is done to whom, and when; 0: another one every time")
	which   = flag.String("broker", "", "apache or embedded; empty: apache, if there are Java and Maven")
	workers = flag.Int("clients", 512, "keyed commands at a time")
	quiet   = flag.Bool("quiet", false, "torture nobody")
	keep    = flag.Bool("keep", false, "keep the data and the logs")

	invoices = flag.String("invoices", "", "of TestReplaysUnderLoad: the file whose orders are loaded; empty: 300 made-up ones")
	orders   = flag.Int("orders", 0, "of TestReplaysUnderLoad: how many orders of the file; 0: all")
)

const (
	partitions = 12
	restWait   = 5 * time.Minute // for the shop to come to rest after a round
	auditWait  = 5 * time.Minute
)

// pace says how hard a round is.
type pace struct {
	round, every, longest time.Duration // its length, between faults, a pause
	loads, orders         int           // runs of `wharf load` in a round, and of how many orders each
}

func paceOf(rounds int) pace {
	if rounds < 10 {
		return pace{round: 10 * time.Second, every: 700 * time.Millisecond, longest: 4 * time.Second, loads: 1, orders: 60}
	}
	return pace{round: 90 * time.Second, every: 1200 * time.Millisecond, longest: time.Minute, loads: 6, orders: 100}
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(brokerVariable); dir != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := runBroker(ctx, dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	flag.Parse()
	os.Exit(m.Run())
}

// run is one run of the test.
type run struct {
	t         *testing.T
	dir       string
	wharf     string // the program
	url       string // of the proxy
	brokers   string
	env       []string
	journal   *os.File // what was done when
	victims   []*victim
	services  map[string]*replicas
	tormentor *tormentor
	clients   *clients
	replayer  *replayer

	mu     sync.Mutex
	ended  map[string]int // programs that ended by themselves, by kind
	orders map[string]int // what became of the orders of `wharf load`

	readBack, staleReads int // of `wharf load`, with tokens
}

// newRun is a shop that runs, until the test ends.
func newRun(t *testing.T) (r *run, kafka string) {
	dir, err := os.MkdirTemp("/var/tmp", "wharf-torture-")
	if err == nil {
		err = os.Chmod(dir, 0o755) // run by root, Postgres is another user
	}
	if err != nil {
		t.Fatal(err)
	}
	r = &run{t: t, dir: dir, ended: map[string]int{}, orders: map[string]int{}, services: map[string]*replicas{}}
	if r.journal, err = os.Create(filepath.Join(dir, "torture.txt")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = r.journal.Close()
		if t.Failed() || *keep {
			t.Logf("everything is kept in %s: torture.txt says what was done when", dir)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	began := time.Now()
	kafka, err = r.start(t.Context())
	t.Cleanup(r.stop)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("seed %d, on %s; ready after %s", *seed, kafka, since(began))
	r.clients = newClients(r.services["stock"], r.say)
	r.replayer = &replayer{run: r}
	return r, kafka
}

// tormentorOf is one who has these victims.
func (r *run) tormentorOf(victims []*victim, every, longest time.Duration) *tormentor {
	return &tormentor{victims: victims, random: rand.New(rand.NewPCG(*seed, 0)), every: every, longest: longest, say: r.say,
		done: map[string]map[string]int{}, busy: map[*victim]bool{}}
}

func TestTorture(t *testing.T) {
	r, kafka := newRun(t)
	ctx := t.Context()
	pace := paceOf(*rounds)
	r.tormentor = r.tormentorOf(r.victims, pace.every, pace.longest)
	client, err := shop.New(r.url, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	loaded := time.Now()
	var sum balance
	for round := range *rounds {
		if err := r.round(ctx, round+1, pace); err != nil {
			t.Fatal(err)
		}
		from := time.Now()
		if err := r.rest(ctx, client); err != nil {
			t.Fatal(err)
		}
		if sum, err = r.clients.compare(ctx, client); err != nil {
			t.Fatal(err)
		}
		t.Logf("round %d: %d commands in all, %d retries; at rest after %s", round+1,
			r.clients.accepted.Load()+r.clients.refused.Load(), r.clients.retries.Load(), since(from))
		if !sum.ok() {
			t.Errorf("round %d: %+v", round+1, sum)
			break
		}
	}
	took := time.Since(loaded)
	log, err := r.clients.compareLog(ctx, []string{r.brokers}, partitions)
	if err != nil {
		t.Error(err)
	}
	broken, orders, err := r.audit(ctx)
	if err != nil {
		t.Error(err)
	}
	rows, events, err := r.replayer.verify(ctx)
	if err != nil {
		t.Error(err)
	}
	said, err := complaints(r.dir)
	if err != nil {
		t.Error(err)
	}
	if len(said) > 0 {
		t.Errorf("the programs said %d things that they must not, such as\n%s", len(said),
			strings.Join(said[:min(len(said), 10)], "\n"))
	}
	sum.lost, sum.doubled = max(sum.lost, log.lost), max(sum.doubled, log.doubled)
	sum.unequal = max(sum.unequal, log.unequal)
	c := r.clients
	if len(c.findings) > 0 || !sum.ok() || c.differing.Load() > 0 || c.wrong.Load() > 0 || broken > 0 || r.staleReads > 0 {
		t.Errorf("found:\n%s", strings.Join(c.findings, "\n"))
	}
	t.Logf("\n%s", r.table(kafka, took, sum, broken, orders)+r.replayer.table(rows, events))
}

func since(t time.Time) time.Duration { return time.Since(t).Round(100 * time.Millisecond) }

// say writes into the run's own log.
func (r *run) say(format string, args ...any) {
	fmt.Fprintf(r.journal, "%s %s\n", time.Now().UTC().Format("15:04:05.000"), fmt.Sprintf(format, args...))
}

// start builds the program and starts everything, and returns when all of it is ready.
func (r *run) start(ctx context.Context) (kafka string, err error) {
	r.wharf = filepath.Join(r.dir, "wharf")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", r.wharf, "../../cmd/wharf").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build wharf: %w: %s", err, out)
	}
	free := ports{map[int]bool{}}
	port := func() int {
		p, err2 := free.next()
		err = cmp.Or(err, err2)
		return p
	}
	kafkaPort, postgresPort, providerPort := port(), port(), port()
	var database string
	var begin errgroup.Group
	var broke, base *victim
	begin.Go(func() (err error) {
		broke, kafka, r.brokers, err = broker(ctx, *which, r.dir, kafkaPort, r.endedByItself)
		return err
	})
	begin.Go(func() (err error) {
		base, database, err = postgres(ctx, filepath.Join(r.dir, "postgres"), postgresPort)
		return err
	})
	startErr := begin.Wait()
	for _, v := range []*victim{broke, base} {
		if v != nil {
			r.victims = append(r.victims, v)
		}
	}
	if err = cmp.Or(startErr, err); err != nil {
		return "", err
	}
	provider := "http://" + addr(providerPort)
	r.env = []string{"WHARF_KAFKA_BROKERS=" + r.brokers, "WHARF_DATABASE_URL=" + database, "WHARF_PARTITIONS=" + strconv.Itoa(partitions),
		"WHARF_PROVIDER_URL=" + provider, "WHARF_PROVIDER_FILE=" + filepath.Join(r.dir, "provider.jsonl")}
	if _, err := r.command(ctx, "topics", "--replication-factor=1"); err != nil {
		return "", err
	}
	program := func(kind string, number, port int, args ...string) string {
		name := fmt.Sprintf("%s-%d", kind, number)
		p := &process{name: name, program: r.wharf, args: append([]string{kind}, args...), ended: r.endedByItself,
			env: append(slices.Clone(r.env), "WHARF_ADDR="+addr(port)), log: filepath.Join(r.dir, name+".log")}
		r.victims = append(r.victims, p.victim(kind, readyz("http://"+addr(port))))
		return "http://" + addr(port)
	}
	program("payment-provider", 1, providerPort, "--provider-no-answer=0.005", "--provider-repeat=0.01", "--provider-slow=0.02")
	for kind, owns := range map[string]string{
		"orders": "orders", "inventory": "stock", "payments": "payments", "shipping": "shipments", "query": "", "projector": "-",
	} {
		r.services[owns] = &replicas{}
		for i := range 2 {
			r.services[owns].all = append(r.services[owns].all, &replica{url: program(kind, i+1, port())})
		}
	}
	if err != nil {
		return "", err
	}
	slices.SortFunc(r.victims, func(a, b *victim) int { return strings.Compare(a.name, b.name) })
	for _, v := range r.victims {
		if err := v.start(ctx); err != nil {
			return "", err
		}
	}
	for _, v := range r.victims {
		if err := v.await(ctx); err != nil {
			return "", err
		}
	}
	l, err := net.Listen("tcp", addr(port()))
	if err != nil {
		return "", err
	}
	r.url = "http://" + l.Addr().String()
	origin := &http.Server{Handler: &proxy{services: r.services, to: transport(proxyPatience)}}
	go func() { _ = origin.Serve(l) }()
	r.t.Cleanup(func() { _ = origin.Close() })
	return kafka, nil
}

// stop ends everything, those that others need last.
func (r *run) stop() {
	for _, needed := range []bool{false, true} {
		var all sync.WaitGroup
		for _, v := range r.victims {
			if v.needed() != needed {
				continue
			}
			all.Go(func() {
				v.resume()
				if err := v.stop(); err != nil {
					r.t.Errorf("at the end: %v", err)
				}
			})
		}
		all.Wait()
	}
}

func (r *run) endedByItself(name, how string) {
	r.say("%s ended by itself: %s", name, how)
	kind := name
	if i := strings.LastIndexByte(name, '-'); i > 0 {
		kind = name[:i]
	}
	// In short: what else it says is an address, and what the network said. The run's log has it all.
	_, why, _ := strings.Cut(how, "wharf ")
	if _, why, _ = strings.Cut(why, ": "); len(why) > 90 {
		why = why[:90]
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended[kind+": "+why]++
}

// command runs wharf to its end, and returns what it prints.
func (r *run) command(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, r.wharf, args...)
	cmd.Env = append(os.Environ(), r.env...)
	cmd.SysProcAttr = attributes()
	log, err := os.OpenFile(filepath.Join(r.dir, args[0]+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, log
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("wharf %s: %w: %s", strings.Join(args, " "), err, lastLine(log.Name()))
	}
	return out.Bytes(), nil
}

// round lets the shop work and suffer for a while, and then work on in peace until everything begun is done.
func (r *run) round(ctx context.Context, number int, p pace) error {
	r.say("round %d", number)
	suffering, cancel := context.WithTimeout(ctx, p.round)
	defer cancel()
	var all errgroup.Group
	for i := range p.loads {
		all.Go(func() error {
			sleep(suffering, p.round*time.Duration(i)/time.Duration(p.loads))
			return r.load(ctx, p.orders)
		})
	}
	all.Go(func() error {
		r.clients.run(suffering, *workers)
		return nil
	})
	if !*quiet {
		all.Go(func() error { return r.tormentor.run(suffering) })
	}
	all.Go(func() error {
		r.replayer.torment(suffering)
		return nil
	})
	all.Go(func() error {
		for suffering.Err() == nil {
			r.say("%d commands", r.clients.accepted.Load()+r.clients.refused.Load())
			sleep(suffering, 5*time.Second)
		}
		return nil
	})
	err := all.Wait()
	r.say("round %d has ended: %v", number, err)
	return err
}

// load drives orders through the shop. Nobody is to lack stock: what a load takes in is twice what it asks for.
func (r *run) load(ctx context.Context, orders int) error {
	args := []string{"load", "--url", r.url, "--orders", strconv.Itoa(orders), "--concurrency", "8", "--stock", "200", "--read-back", "--json"}
	out, err := r.command(ctx, args...)
	for err != nil && strings.Contains(err.Error(), "the shop does not answer") { // which it finds out before it begins
		out, err = r.command(ctx, args...)
	}
	if err != nil {
		return err
	}
	var report map[string]float64
	if err := json.Unmarshal(out, &report); err != nil {
		return fmt.Errorf("the report %q: %w", out, err)
	}
	r.say("load: %s", bytes.TrimSpace(out))
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, what := range []string{"placed", "delivered", "cancelled", "rejected", "expired"} {
		r.orders[what] += int(report[what])
	}
	r.staleReads += int(report["stale_reads"])
	r.readBack += int(report["read_back"])
	if final := report["delivered"] + report["cancelled"] + report["rejected"] + report["expired"]; final != float64(orders) {
		return fmt.Errorf("of %d orders %v are final: %s", orders, final, out)
	}
	return nil
}

// rest waits until the shop is at rest.
func (r *run) rest(ctx context.Context, client *shop.Client) error {
	ctx, cancel := context.WithTimeout(ctx, restWait)
	defer cancel()
	for why := "it does not answer"; ; {
		_, now, err := client.Resting(ctx)
		switch {
		case err == nil && now == "":
			return nil
		case err == nil:
			why = now
		}
		if ctx.Err() != nil {
			return fmt.Errorf("not at rest after %s: %s", restWait, why)
		}
		sleep(ctx, lookAgain)
	}
}

// audit is how many invariants are broken, and of how many orders.
func (r *run) audit(ctx context.Context) (broken, orders int, err error) {
	out, err := r.command(ctx, "audit", "--url", r.url, "--wait", auditWait.String(), "--json")
	var report struct {
		Items   []json.RawMessage
		Summary struct{ Orders int }
	}
	if json.Unmarshal(out, &report) != nil {
		return 0, 0, cmp.Or(err, fmt.Errorf("the audit said %q", out))
	}
	return len(report.Items), report.Summary.Orders, err
}

// table is what a run has to say in the end.
func (r *run) table(kafka string, took time.Duration, sum balance, broken, orders int) string {
	var b strings.Builder
	row := func(name string, value any) { fmt.Fprintf(&b, "%-36s %12v\n", name, value) }
	c := r.clients
	commands := c.accepted.Load() + c.refused.Load()
	row("rounds", *rounds)
	row("seed", *seed)
	row("broker", kafka)
	row("minutes", fmt.Sprintf("%.1f", took.Minutes()))
	for _, what := range []string{kill, pause, restart} {
		n := 0
		for _, kind := range slices.Sorted(maps.Keys(r.tormentor.done)) {
			n += r.tormentor.done[kind][what]
		}
		row(what+"s", n)
		for _, kind := range slices.Sorted(maps.Keys(r.tormentor.done)) {
			row("  "+kind, r.tormentor.done[kind][what])
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, times := range r.ended {
		n += times
	}
	row("ended by themselves, started again", n)
	for _, kind := range slices.Sorted(maps.Keys(r.ended)) { // and why
		fmt.Fprintf(&b, "  %s: %d\n", kind, r.ended[kind])
	}
	row("orders driven to their end", orders)
	for _, what := range []string{"delivered", "cancelled", "rejected", "expired"} {
		row("  "+what, r.orders[what])
	}
	row("commands acknowledged", commands)
	row("  of them refusals", c.refused.Load())
	row("commands/s", fmt.Sprintf("%.0f", float64(commands)/took.Seconds()))
	row("retries", c.retries.Load())
	row("repeats checked", c.repeats.Load()+c.late.Load())
	row("lost", sum.lost)
	row("doubled", sum.doubled)
	row("SKUs with other units", sum.unequal)
	row("differing answers", c.differing.Load())
	row("wrong answers", c.wrong.Load())
	row("orders read with their token", r.readBack)
	row("  answers that did not know them", r.staleReads)
	row("audit broken", broken)
	return b.String()
}
