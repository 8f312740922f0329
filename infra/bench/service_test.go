//go:build bench

package bench_test

import (
	"context"
	"errors"
	"math"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"wharf/commands"
	ordersapi "wharf/commands/orders"
	"wharf/domain"
	"wharf/domain/orders"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
	"wharf/infra/kafka"
	"wharf/infra/web"
)

// command is what is asked of one stream after the other, and the record that comes of it.
type command[S commands.State[S]] struct {
	events domain.Events
	decide commands.Decision[S]
	sample journal.Record
}

func counterCommand() command[journaltest.Counter] {
	c := command[journaltest.Counter]{events: journaltest.Events, decide: journaltest.Count(1, math.MaxInt)}
	c.sample = capture(c.events, step[journaltest.Counter]{decide: c.decide})[0]
	return c
}

// placeCommand is the order of orderBody, as the command API places it.
func placeCommand() command[orders.Order] {
	c := command[orders.Order]{events: orders.Events, decide: placed}
	c.sample = capture(c.events, step[orders.Order]{key: uuid.NewString(), trace: trace, decide: placed})[0]
	return c
}

const trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

func placed(o orders.Order) ([]domain.Event, error) {
	price := func(amount int64) domain.Money { return domain.Money{Amount: amount, Currency: "GBP"} }
	return o.DecidePlace("17850", []orders.Line{{SKU: "85123A", Quantity: 6, UnitPrice: price(255)},
		{SKU: "71053", Quantity: 6, UnitPrice: price(339)}}, time.Now().Add(15*time.Minute).UTC().Truncate(time.Millisecond))
}

// step is one command in the life of a stream.
type step[S any] struct {
	key, trace string
	cause      domain.Position // of a policy
	decide     commands.Decision[S]
}

// capture is the records that the steps make of one stream.
func capture[S commands.State[S]](events domain.Events, steps ...step[S]) (records []journal.Record) {
	log := journal.NewMemory(partitions)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	j := journal.New[S](journal.Config{Service: "capture", Topic: "capture.events", Partitions: partitions, Events: events,
		Log: log, Public: journal.NewMemory(partitions)})
	go func() { _ = j.Run(ctx) }()
	stream := uuid.NewString()
	for _, s := range steps {
		c := commands.Command{Stream: stream, Key: s.key, Request: s.key, IfMatch: commands.AnyVersion, Trace: s.trace, Cause: s.cause}
		if s.cause.Topic != "" {
			c.Group = "policies"
		}
		if _, err := j.Handle(ctx, c, s.decide); err != nil {
			panic(err)
		}
	}
	_ = log.Read(ctx, journal.Partition([]byte(stream), partitions), 0, func(b journal.Batch) error {
		records = append(records, b.Records...)
		if len(records) == len(steps) {
			return context.Canceled
		}
		return nil
	})
	return records
}

// replica starts a replica on topics of the service's name, and returns when all of it is ready.
func replica[S commands.State[S]](t *testing.T, c *kafka.Client, service string, events domain.Events, publish bool) (
	j *journal.Journal[S], stop func(),
) {
	j = journal.New[S](journal.Config{Service: service, Topic: service + ".events", Partitions: partitions, Events: events,
		Log: c.Log(service + ".journal"), Public: c.PublicLog(service + ".events")})
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		if err := j.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	if publish {
		for p := range int32(partitions) {
			all.Go(func() { j.Publish(ctx, p) })
		}
	}
	// A command that finds nothing to do is answered when its partition has been read to the end.
	for left, i := partitions, 0; left > 0; i++ {
		stream := strconv.Itoa(i)
		if int(journal.Partition([]byte(stream), partitions)) != partitions-left {
			continue
		}
		first, enough := context.WithTimeout(ctx, time.Minute)
		_, err := j.Handle(first, commands.Command{Stream: stream, IfMatch: commands.AnyVersion},
			func(S) ([]domain.Event, error) { return nil, nil })
		enough()
		if err != nil {
			t.Fatal(err)
		}
		left--
	}
	return j, func() { cancel(); all.Wait() }
}

func newService() string { return "bench-" + uuid.NewString()[:8] }

// journalRun gives the command to ever new streams.
func journalRun[S commands.State[S]](t *testing.T, b broker, c command[S], publish bool, l load) stat {
	t.Helper()
	kc, end := b.connect(t)
	defer end()
	service := newService()
	defer b.topics(t, kc, service+".journal", service+".events")()
	j, stop := replica[S](t, kc, service, c.events, publish)
	defer stop()
	s, err := drive(l, func(int) error {
		_, err := j.Handle(t.Context(), commands.Command{Stream: uuid.NewString(), IfMatch: commands.AnyVersion}, c.decide)
		return err
	})
	if err != nil {
		t.Fatalf("without HTTP: %v", err)
	}
	return s
}

// hotRun gives commands to one stream, at replicas with clients of their own, one of which publishes. A caller that is
// told "too many other changes" asks again.
func hotRun(t *testing.T, b broker) (s stat, rejectedPercent, conflictPercent float64) {
	t.Helper()
	admin, end := b.connect(t)
	defer end()
	service := newService()
	defer b.topics(t, admin, service+".journal", service+".events")()
	c := counterCommand()
	var replicas []*journal.Journal[journaltest.Counter]
	for i := range hotReplicas {
		kc, end := b.connect(t)
		defer end()
		j, stop := replica[journaltest.Counter](t, kc, service, c.events, i == 0)
		defer stop()
		replicas = append(replicas, j)
	}
	var asked, conflicts atomic.Int64
	s, err := drive(closed(hotReplicas**hot), func(w int) error {
		for {
			asked.Add(1)
			_, err := replicas[w%hotReplicas].Handle(t.Context(), commands.Command{Stream: "hot", IfMatch: commands.AnyVersion},
				c.decide)
			if !errors.Is(err, commands.ErrConflict) {
				return err
			}
			conflicts.Add(1)
		}
	})
	if err != nil {
		t.Fatalf("one hot stream: %v", err)
	}
	accepted, rejected := judged(service)
	t.Logf("%.0f commits were accepted, %.0f rejected", accepted/hotReplicas, rejected/hotReplicas)
	return s, 100 * rejected / (accepted + rejected), 100 * float64(conflicts.Load()) / float64(asked.Load())
}

// judged is what the replicas of a service have made of its commits, as their metric tells.
func judged(service string) (accepted, rejected float64) {
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		panic(err)
	}
	for _, f := range families {
		if f.GetName() != "wharf_journal_records_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			switch n := m.GetCounter().GetValue(); {
			case labels["service"] != service:
			case labels["verdict"] == journal.Accepted.String():
				accepted += n
			default:
				rejected += n
			}
		}
	}
	return accepted, rejected
}

// ordersHTTPRun has orders placed at the orders service: its API, its journal, its publisher and its deadlines, on the
// shop's own server.
func ordersHTTPRun(t *testing.T, b broker, c client) stat {
	t.Helper()
	kc, end := b.connect(t)
	defer end()
	service := newService()
	defer b.topics(t, kc, service+".journal", service+".events")()
	j, stop := replica[orders.Order](t, kc, service, orders.Events, true)
	defer stop()
	api := ordersapi.Service{Journal: j, Deadline: 15 * time.Minute, Now: time.Now}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	for p := range int32(partitions) {
		all.Go(func() { api.Deadlines(ctx, p) })
	}
	register := func(a huma.API) { ordersapi.Register(a, api) }
	document, err := web.Document(register)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	register(web.NewAPI(mux))
	return serveFor(t, web.Handler(mux, document, "bench", j.Ready), c)
}

// watched is a log that tells when the reader of each partition is through with what there was.
type watched struct {
	journal.Log
	ends []int64
	left *sync.WaitGroup // a count a partition
}

func (l watched) Read(ctx context.Context, p int32, from int64, f func(journal.Batch) error) error {
	reached := l.ends[p] == 0
	return l.Log.Read(ctx, p, from, func(b journal.Batch) error {
		err := f(b)
		if err == nil && !reached && b.Next >= l.ends[p] {
			reached = true
			l.left.Done()
		}
		return err
	})
}

// startRun is how fast a replica that has read nothing yet becomes ready.
func startRun(t *testing.T, b broker, topic string, n int) stat {
	t.Helper()
	kc, end := b.connect(t)
	defer end()
	log := watched{kc.Log(topic), endsOf(t, b, topic), new(sync.WaitGroup)}
	f := foldRun[orders.Order](t, log, orders.Events, n)
	f.stop()
	return f.stat
}

// folded is a replica that has read a log to its end.
type folded[S commands.State[S]] struct {
	stat
	journal *journal.Journal[S]
	stop    func()
}

func foldRun[S commands.State[S]](t *testing.T, log watched, events domain.Events, n int) folded[S] {
	t.Helper()
	for _, end := range log.ends {
		if end > 0 {
			log.left.Add(1)
		}
	}
	service := newService()
	j := journal.New[S](journal.Config{Service: service, Topic: service + ".events", Partitions: partitions, Events: events,
		Log: log})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error)
	began := time.Now()
	go func() { ran <- j.Run(ctx) }()
	log.left.Wait()
	took := time.Since(began)
	stop := func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	}
	if accepted, rejected := judged(service); int(accepted) != n || rejected > 0 {
		t.Fatalf("%.0f commits were accepted and %.0f not, of %d", accepted, rejected, n)
	}
	return folded[S]{statOf(n, took, nil), j, stop}
}
