package journal_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
)

// counter is the smallest aggregate: it counts up to a limit.
type counter struct{ N int }

type counted struct{ By int }

func (counted) EventName() string { return "counter.counted.v1" }

func (c counter) Evolve(e domain.Event) counter {
	if e, ok := e.(counted); ok {
		c.N += e.By
	}
	return c
}
func (c counter) Closed() bool { return false }

var errFull = domain.Refuse("full", "the counter is full")

func count(by, limit int) commands.Decision[counter] {
	return func(c counter) ([]domain.Event, error) {
		if c.N+by > limit {
			return nil, errFull
		}
		return []domain.Event{counted{by}}, nil
	}
}

var _ commands.Journal[counter] = (*journal.Journal[counter])(nil)

const partitions = 3

// shop is a journal on two topics in memory, with as many replicas as a test wants.
type shop struct {
	t           *testing.T
	log, public *journal.Memory
}

func newShop(t *testing.T) *shop {
	return &shop{t, journal.NewMemory(partitions), journal.NewMemory(partitions)}
}

func (s *shop) config() journal.Config {
	return journal.Config{Service: "counters", Topic: "counters.events", Partitions: partitions,
		Events: domain.EventsOf(counted{}), Log: s.log, Public: s.public}
}

func (s *shop) replica() *journal.Journal[counter] { return s.replicaOn(s.config()) }

func (s *shop) replicaOn(c journal.Config) *journal.Journal[counter] {
	j := journal.New[counter](c)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := j.Run(ctx); err != nil {
			s.t.Error(err)
		}
	})
	for p := range int32(partitions) {
		wg.Go(func() { j.Publish(ctx, p) })
	}
	s.t.Cleanup(func() { cancel(); wg.Wait() })
	return j
}

func (s *shop) published(stream string, n int) (events []domain.Recorded) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	last := int64(0)
	done := errors.New("done")
	err := s.public.Read(ctx, journal.Partition([]byte(stream), partitions), 0, func(b journal.Batch) error {
		for _, r := range b.Records {
			e, ok := journal.ParseEvent("counters.events", r)
			if !ok {
				continue
			}
			process, err := journal.Next(last, e)
			if err != nil {
				return err
			}
			if !process {
				continue
			}
			last = e.Seq
			if events = append(events, e); len(events) >= n {
				return done
			}
		}
		return nil
	})
	if !errors.Is(err, done) {
		s.t.Fatal(err)
	}
	return events
}

func cmd(stream string) commands.Command {
	return commands.Command{Stream: stream, IfMatch: commands.AnyVersion}
}

func TestConcurrentCommandsOnManyReplicasAllCount(t *testing.T) {
	s := newShop(t)
	replicas := []*journal.Journal[counter]{s.replica(), s.replica(), s.replica()}
	const calls = 60
	var wg sync.WaitGroup
	for i, j := range replicas {
		for n := range calls {
			wg.Go(func() {
				for {
					c := cmd("a")
					c.Key = fmt.Sprint(i, "-", n)
					_, err := j.Handle(t.Context(), c, count(1, 1<<30))
					if errors.Is(err, commands.ErrConflict) {
						continue
					}
					if err != nil {
						t.Error(err)
					}
					return
				}
			})
		}
	}
	wg.Wait()
	r, err := replicas[0].Handle(t.Context(), cmd("a"), count(0, 1<<30))
	if err != nil || r.Version != calls*3+1 {
		t.Fatalf("version %d after %d commands: %v", r.Version, calls*3, err)
	}
	for i, e := range s.published("a", calls*3+1) {
		if e.Version != int64(i)+1 {
			t.Fatalf("event %d has version %d", i, e.Version)
		}
	}
}

func TestRefusalsAndKeys(t *testing.T) {
	s := newShop(t)
	j, other := s.replica(), s.replica()
	c := cmd("a")
	c.Key, c.Request = "k1", "count 2"
	first, err := j.Handle(t.Context(), c, count(2, 2))
	if err != nil || first.Version != 1 {
		t.Fatal(first, err)
	}
	again, err := other.Handle(t.Context(), c, count(2, 2))
	if err != nil || again != first {
		t.Fatal("a retry on another replica is answered", again, err)
	}
	c.Request = "count 3"
	if _, err := other.Handle(t.Context(), c, count(3, 9)); !errors.Is(err, commands.ErrKeyReused) {
		t.Fatal(err)
	}
	c.Key = "k2"
	if _, err := j.Handle(t.Context(), c, count(3, 2)); !errors.Is(err, errFull) {
		t.Fatal(err)
	}
	// The refusal stands, though there would be room now.
	if _, err := other.Handle(t.Context(), c, count(3, 99)); !errors.Is(err, errFull) {
		t.Fatal(err)
	}
	c = cmd("a")
	c.IfMatch = 7
	if _, err := other.Handle(t.Context(), c, count(1, 99)); !errors.Is(err, commands.ErrPrecondition) {
		t.Fatal(err)
	}
	c.IfMatch = 1
	if r, err := other.Handle(t.Context(), c, count(1, 99)); err != nil || r.Version != 2 {
		t.Fatal(r, err)
	}
}

func TestACauseIsHandledOnce(t *testing.T) {
	s := newShop(t)
	j := s.replica()
	c := cmd("a")
	c.Group = "policies"
	for _, seq := range []int64{3, 3, 2, 4, 4} {
		c.Cause = domain.Position{Topic: "others.events", Partition: 1, Seq: seq}
		if _, err := j.Handle(t.Context(), c, count(1, 99)); err != nil {
			t.Fatal(err)
		}
	}
	events := s.published("a", 2)
	if events[1].Cause.Seq != 4 {
		t.Fatalf("causes %v and %v", events[0].Cause, events[1].Cause)
	}
	if r, _ := s.replica().Handle(t.Context(), c, count(1, 99)); r.Version != 2 {
		t.Fatalf("version %d", r.Version)
	}
}
