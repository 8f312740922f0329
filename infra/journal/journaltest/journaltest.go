// Package journaltest answers the question "does the journal keep its promises on this log?". It is the conformance
// suite that every implementation of journal.Log and journal.PublicLog must pass: Run in log.go and protocol.go.
// This file is the smallest service there is, which the tests run on.
package journaltest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
)

// Counter is an aggregate that counts.
type Counter struct {
	N    int
	Done bool
}

// Counted and Finished are its events. Op names what asked for them, where a history is taken.
type (
	Counted struct {
		By int
		Op string `json:",omitempty"`
	}
	Finished struct {
		Op string `json:",omitempty"`
	}
)

func (Counted) EventName() string  { return "counter.counted.v1" }
func (Finished) EventName() string { return "counter.finished.v1" }

// Evolve implements commands.State.
func (c Counter) Evolve(e domain.Event) Counter {
	switch e := e.(type) {
	case Counted:
		c.N += e.By
	case Finished:
		c.Done = true
	}
	return c
}

// Closed implements commands.State.
func (c Counter) Closed() bool { return c.Done }

// Events is the service's vocabulary.
var Events = domain.EventsOf(Counted{}, Finished{})

// ErrFull refuses to count beyond a limit.
var ErrFull = domain.Refuse("full", "the counter is full")

// Count counts up, if the limit allows it.
func Count(by, limit int) commands.Decision[Counter] {
	return func(c Counter) ([]domain.Event, error) {
		if c.N+by > limit {
			return nil, ErrFull
		}
		return []domain.Event{Counted{By: by}}, nil
	}
}

// Exist finds nothing to do on a counter that has counted, and refuses the others.
func Exist(c Counter) ([]domain.Event, error) {
	if c.N == 0 {
		return nil, domain.ErrUnknown
	}
	return nil, nil
}

// Partitions is how many the suite's topics have.
const Partitions = 3

// Patience bounds what must happen; nothing is expected to take that long.
const Patience = 30 * time.Second

// Service is a journal's two topics, on which a test starts as many replicas as it likes.
type Service struct {
	T      testing.TB
	Log    journal.Log
	Public journal.PublicLog
}

// Config is a replica's.
func (s *Service) Config() journal.Config {
	return journal.Config{Service: "counters", Topic: "counters.events", Partitions: Partitions, Events: Events,
		Log: s.Log, Public: s.Public}
}

// Replica starts a replica that also publishes, until the test ends.
func (s *Service) Replica() *journal.Journal[Counter] {
	j, _ := s.Start(s.Config())
	return j
}

// Start starts a replica that also publishes, until the test ends or it is stopped.
func (s *Service) Start(c journal.Config) (j *journal.Journal[Counter], stop func()) {
	j = journal.New[Counter](c)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := j.Run(ctx); err != nil {
			s.T.Error(err)
		}
	})
	for p := range int32(Partitions) {
		wg.Go(func() { j.Publish(ctx, p) })
	}
	stop = func() { cancel(); wg.Wait() }
	s.T.Cleanup(stop)
	return j, stop
}

// Published is the first n events that a consumer of the stream's partition sees. It fails the test on a gap.
func (s *Service) Published(stream string, n int) (events []domain.Recorded) {
	s.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	done := errors.New("done")
	err := s.Public.Read(ctx, journal.Partition([]byte(stream), Partitions), 0, func(b journal.Batch) error {
		for _, r := range b.Records {
			e, ok := journal.ParseEvent("counters.events", r)
			if !ok {
				continue
			}
			process, err := journal.Next(int64(len(events)), e)
			if err != nil {
				return err
			}
			if !process {
				continue
			}
			if events = append(events, e); len(events) >= n {
				return done
			}
		}
		return nil
	})
	if !errors.Is(err, done) {
		s.T.Fatalf("%d of %d events were published: %v", len(events), n, err)
	}
	return events
}

// To is a command to the stream.
func To(stream string) commands.Command {
	return commands.Command{Stream: stream, IfMatch: commands.AnyVersion}
}

// Keyed is a command to the stream with an Idempotency-Key.
func Keyed(stream, key, request string) commands.Command {
	c := To(stream)
	c.Key, c.Request = key, request
	return c
}

// Caused is a command to the stream by a policy.
func Caused(stream string, partition int32, seq int64) commands.Command {
	c := To(stream)
	c.Group, c.Cause = "policies", domain.Position{Topic: "others.events", Partition: partition, Seq: seq}
	return c
}
