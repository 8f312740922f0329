//go:build bench

// Package bench_test answers the question "how near to the limits of this machine are the append path and the read side?".
// It runs with `make bench`, and prints one table: what Wharf does beside what the same broker, the same bytes, the same
// rows, the same HTTP server and the same Postgres can do at best, taken in the same run, in turns. A figure that is short of its target fails nothing: figures
// differ from machine to machine, and on one that is not quiet.
//
// Read this file first: the flags, the table, and the measures of the append path, a test each. Then limits_test.go (what is
// possible) and service_test.go (what Wharf does), memory_test.go; read_test.go (the measures of the read side),
// readlimits_test.go, logs_test.go (what read models are made of); and the tools: drive_test.go (callers), processes_test.go (the
// broker and the HTTP client, which are processes of their own).
package bench_test

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"wharf/infra/telemetry"
)

var (
	seconds    = flag.Float64("seconds", 4, "how long a run is measured, after a warm-up of a third of it (2 s at most)")
	rounds     = flag.Int("rounds", 3, "how often each measure is taken; medians are reported")
	streams    = flag.Int("streams", 200_000, "streams that are kept in memory; up to 10,000,000")
	commits    = flag.Int("commits", 500_000, "commits in the log that a replica starts from")
	best       = flag.Float64("best", 12_600, "commands/s of the best framework over many streams at 256 callers")
	only       = flag.String("brokers", "kfake,apache", "the brokers to measure on")
	hot        = flag.Int("hot", 1024, "callers of the hot stream at each of its replicas")
	asking     = flag.String("callers", "1,16,64,256,1024", "callers at a time")
	readOrders = flag.Int("orders", 10_000, "made-up orders of the log that read models are made of; each has 28 events")
	invoices   = flag.String("invoices", "", "a file of invoices, as wharf load takes it: the log of them is measured as well")
	sizes      = flag.String("sizes", "100000,1000000", "events of the logs that show how replay grows; 10000000 takes 10 GiB of disk")
	peers      = flag.String("peers", "", "a shell command that runs frameworks and prints {\"peer\", \"measure\", \"rate_per_s\"} a line")
	side       = flag.String("side", "", "measure only wharf, or only limit, and no half load: for a profile")

	callers []int
)

// partitions of every topic: the default of `wharf --partitions`.
const partitions = 12

// What the table compares with.
const (
	busy        = 256    // callers at which a service counts as busy
	hotTarget   = 40_000 // commands/s on one stream
	hotReplicas = 3
	hotRejected = 10  // percent of the commits
	closedBytes = 200 // of a closed stream, beyond its id
	tenMillion  = 2   // GiB that ten million streams may take
)

func TestMain(m *testing.M) {
	if play := roles[os.Getenv(roleVariable)]; play != nil {
		if err := play(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	flag.Parse()
	if testing.Short() { // only to see that it works
		*seconds, *rounds, *streams, *commits, *asking = 0.6, 1, 20_000, 50_000, "1,256"
	}
	for n := range strings.SplitSeq(*asking, ",") {
		count, err := strconv.Atoi(n)
		if err != nil || count < 1 || count > 1<<16 {
			fmt.Fprintln(os.Stderr, "-callers: expected numbers with commas between")
			os.Exit(2)
		}
		callers = append(callers, count)
	}
	// Traces are made, as in production.
	if _, err := telemetry.Setup(os.Stderr, slog.LevelWarn, "text"); err != nil {
		panic(err)
	}
	code := m.Run()
	stopBrokers()
	results.print(os.Stdout)
	os.Exit(code)
}

// runs is how long a run is measured, warms how long it is not.
func runs() time.Duration  { return time.Duration(*seconds * float64(time.Second)) }
func warms() time.Duration { return min(runs()/3, 2*time.Second) }

// row is a line of the table. The slices have an entry a round.
type row struct {
	measure string
	callers int
	broker  string
	wharf   []float64
	limit   []float64
	least   float64 // the ratio must be at least this, or
	most    float64 // at most this; with neither it is for information
}

type table struct{ rows []*row }

var results table

// add enters one round. A side that was not measured is 0.
func (t *table) add(r row, wharf, limit float64) {
	i := slices.IndexFunc(t.rows, func(o *row) bool {
		return o.measure == r.measure && o.callers == r.callers && o.broker == r.broker
	})
	if i < 0 {
		i = len(t.rows)
		t.rows = append(t.rows, &r)
	}
	t.rows[i].wharf = append(t.rows[i].wharf, wharf)
	t.rows[i].limit = append(t.rows[i].limit, limit)
}

func (t *table) print(w io.Writer) {
	fmt.Fprintf(w, "\n%d rounds of %.1f s, medians; %s, %d CPUs, %d partitions; every process on this machine.\n",
		*rounds, *seconds, runtime.Version(), runtime.GOMAXPROCS(0), partitions)
	fmt.Fprint(w, notes)
	// A measure's brokers and numbers of callers stand together, whichever was taken first.
	order := map[string]int{}
	for _, r := range t.rows {
		if _, known := order[r.measure]; !known {
			order[r.measure] = len(order)
		}
	}
	slices.SortStableFunc(t.rows, func(a, b *row) int {
		if d := order[a.measure] - order[b.measure]; d != 0 {
			return d
		}
		if d := strings.Compare(b.broker, a.broker); d != 0 {
			return d
		}
		return a.callers - b.callers
	})
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "measure\tcallers\tbroker\twharf\tlimit\tratio\ttarget\t")
	for _, r := range t.rows {
		ratios := make([]float64, len(r.wharf))
		for i := range ratios {
			ratios[i] = r.wharf[i] / r.limit[i]
		}
		ratio, target, verdict := median(ratios), "", ""
		switch {
		case r.least > 0:
			target, verdict = fmt.Sprintf(">= %.2f", r.least), verdicts[ratio >= r.least]
		case r.most > 0:
			target, verdict = fmt.Sprintf("<= %.2f", r.most), verdicts[ratio <= r.most]
		}
		count := ""
		if r.callers > 0 {
			count = strconv.Itoa(r.callers)
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			r.measure, count, r.broker, figure(median(r.wharf)), figure(median(r.limit)), figure(ratio), target, verdict)
	}
	_ = tab.Flush()
}

var verdicts = map[bool]string{true: "ok", false: "short"}

const notes = `kfake is the embedded broker in a process of its own; Apache Kafka is 4.3.1, one broker. Both answer with acks=all when
the record is with the operating system: it survives the death of the broker, not a loss of power. (The frameworks that
many streams are compared with wrote to Postgres, which flushes to the disk.)
A commit's bytes are those that the limit publishes: watermill-kafka's Publisher, acks=all, idempotent, one request in
flight, read back by a Sarama partition consumer in the same process. The HTTP client is a process of its own.
Half load is half of what Wharf has just done at 256 callers, for both. The memory of a stream is that of living objects;
the heap of ten million, of which -streams were made, is all that the heap occupies, with what lies free in between.
Read models read from kfake and write to a Postgres that does not wait for the disk, on both sides. Raw: the same rows in
the same batches, each with its position, nothing read, decoded or folded.

`

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// figure has three or more digits.
func figure(v float64) string {
	switch {
	case math.IsNaN(v):
		return ""
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// wharf and limit take one figure, or 0 when only the other side is wanted.
func wharf(f func() stat) stat { return take("wharf", f) }
func limit(f func() stat) stat { return take("limit", f) }

func take(which string, f func() stat) stat {
	if *side != "" && *side != which {
		return stat{}
	}
	runtime.GC() // what the last run has left is not this one's to collect
	return f()
}

// TestManyStreams measures commands to streams of their own, one event each, without HTTP.
func TestManyStreams(t *testing.T) {
	counter := counterCommand()
	onBrokers(t, func(t *testing.T, b broker) {
		for range *rounds {
			for _, n := range callers {
				raw := limit(func() stat { return rawRun(t, b, counter.sample, closed(n)) })
				own := wharf(func() stat { return journalRun(t, b, counter, true, closed(n)) })
				results.add(row{measure: "many streams, without HTTP: commands/s", callers: n, broker: b.name, least: 0.8},
					own.rate, raw.rate)
				if n != busy || *side != "" {
					continue
				}
				results.add(row{measure: "  against the best framework: commands/s", callers: n, broker: b.name, least: 3},
					own.rate, *best)
				alone := wharf(func() stat { return journalRun(t, b, counter, false, closed(n)) })
				results.add(row{measure: "  without the publisher of events: commands/s", callers: n, broker: b.name},
					alone.rate, raw.rate)
				half := own.rate / 2
				rawHalf := limit(func() stat { return rawRun(t, b, counter.sample, open(half)) })
				ownHalf := wharf(func() stat { return journalRun(t, b, counter, true, open(half)) })
				results.add(row{measure: "  at half load: p50, ms", broker: b.name, most: 1.5}, ownHalf.p50, rawHalf.p50)
				results.add(row{measure: "  at half load: p99, ms", broker: b.name, most: 3}, ownHalf.p99, rawHalf.p99)
			}
		}
	})
}

// TestHTTP measures orders that are placed through the command API.
func TestHTTP(t *testing.T) {
	place := placeCommand()
	onBrokers(t, func(t *testing.T, b broker) {
		for range *rounds {
			for _, n := range callers {
				plain := limit(func() stat { return plainHTTPRun(t, client{Callers: n}) })
				raw := limit(func() stat { return rawRun(t, b, place.sample, closed(n)) })
				both := 1 / (1/plain.rate + 1/raw.rate)
				own := wharf(func() stat { return ordersHTTPRun(t, b, client{Callers: n}) })
				results.add(row{measure: "orders placed through HTTP: commands/s", callers: n, broker: b.name, least: 0.6},
					own.rate, both)
				results.add(row{measure: "  HTTP alone: requests/s", callers: n, broker: b.name}, own.rate, plain.rate)
				results.add(row{measure: "  publish and read back alone: records/s", callers: n, broker: b.name},
					own.rate, raw.rate)
				if n != busy || *side != "" {
					continue
				}
				half := own.rate / 2
				rawHalf := rawRun(t, b, place.sample, open(half))
				ownHalf := ordersHTTPRun(t, b, client{Callers: n, Rate: half})
				results.add(row{measure: "  at half load, beside no HTTP: p50, ms", broker: b.name}, ownHalf.p50, rawHalf.p50)
				results.add(row{measure: "  at half load, beside no HTTP: p99, ms", broker: b.name}, ownHalf.p99, rawHalf.p99)
			}
		}
	})
}

// TestHotStream measures commands to one stream at several replicas.
func TestHotStream(t *testing.T) {
	onBrokers(t, func(t *testing.T, b broker) {
		for range *rounds {
			n := hotReplicas * *hot
			own, rejected, conflicts := hotRun(t, b)
			results.add(row{measure: "one hot stream, 3 replicas: commands/s", callers: n, broker: b.name,
				least: 1}, own.rate, hotTarget)
			results.add(row{measure: "  rejected commits, percent", callers: n, broker: b.name, most: 1},
				rejected, hotRejected)
			results.add(row{measure: "  commands refused because of others, percent", callers: n, broker: b.name},
				conflicts, math.NaN())
			results.add(row{measure: "  p99, ms", callers: n, broker: b.name}, own.p99, math.NaN())
		}
	})
}

// TestStart measures how fast a new replica folds a log.
func TestStart(t *testing.T) {
	place := placeCommand()
	onBrokers(t, func(t *testing.T, b broker) {
		topic := fill(t, b, newReplay(t, *commits, place.sample))
		for range *rounds {
			raw := limit(func() stat { return rawConsume(t, b, topic, *commits) })
			own := wharf(func() stat { return startRun(t, b, topic, *commits) })
			results.add(row{measure: "start of a replica: commits/s", broker: b.name, least: 0.6}, own.rate, raw.rate)
		}
	})
}
