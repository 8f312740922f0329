package journal_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

// gate is a log that holds appends back while it is shut.
type gate struct {
	*journal.Memory
	mu      sync.Mutex
	shut    chan struct{}
	largest int
}

func (g *gate) Append(ctx context.Context, r journal.Record) error {
	g.mu.Lock()
	g.largest = max(g.largest, len(r.Value))
	shut := g.shut
	g.mu.Unlock()
	if shut != nil {
		select {
		case <-shut:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return g.Memory.Append(ctx, r)
}

// close shuts the gate. The function it returns opens it for what waits there; what comes later finds it as it is then.
func (g *gate) close() (open func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	shut := make(chan struct{})
	g.shut = shut
	return func() {
		g.mu.Lock()
		if g.shut == shut {
			g.shut = nil
		}
		g.mu.Unlock()
		close(shut)
	}
}

// Equal requests at the same time have one outcome, even where more keyed commands than a stream remembers share the
// commit between them.
func TestOneKeyAtTheSameTimeAsMoreThanAStreamRemembers(t *testing.T) {
	const others = journal.KeysPerStream + 4
	for _, replicas := range []int{1, 2} {
		t.Run(fmt.Sprint(replicas, " replicas"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, public := journal.NewMemory(journaltest.Partitions), journal.NewMemory(journaltest.Partitions)
				start := func() (*gate, *journal.Journal[journaltest.Counter]) {
					g := &gate{Memory: log}
					return g, (&journaltest.Service{T: t, Log: g, Public: public}).Replica()
				}
				gateA, a := start()
				gateB, b := gateA, a
				if replicas == 2 {
					gateB, b = start()
				}
				if _, err := a.Handle(t.Context(), journaltest.Keyed("a", "create", ""), journaltest.Count(1, 1<<20)); err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				do := func(j *journal.Journal[journaltest.Counter], key string) {
					wg.Go(func() {
						if _, err := j.Handle(t.Context(), journaltest.Keyed("a", key, ""), journaltest.Count(1, 1<<20)); err != nil {
							t.Error(err)
						}
					})
					synctest.Wait()
				}
				openA := gateA.close()
				do(a, "plug") // its flight makes a group form behind it
				for i := range others {
					do(a, fmt.Sprint("k", i))
				}
				openB := gateB.close() // for what comes after the plug
				if replicas == 2 {
					do(b, "k0")
				}
				openA()
				synctest.Wait() // the plug has landed; with one replica the group waits at the gate now
				want := int64(others + 2)
				if replicas == 1 {
					do(b, "k0")
				} else {
					for i := range others { // more of them while b waits to try again
						do(a, fmt.Sprint("m", i))
					}
					want += others
				}
				openB()
				wg.Wait()
				r, err := a.Handle(t.Context(), journaltest.To("a"), journaltest.Exist)
				if err != nil || r.Version != want {
					t.Fatalf("version %d, want %d: %v", r.Version, want, err)
				}
			})
		})
	}
}

func TestAGroupOfKeyedRefusalsHasALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{Memory: journal.NewMemory(journaltest.Partitions)}
		j := (&journaltest.Service{T: t, Log: g, Public: journal.NewMemory(journaltest.Partitions)}).Replica()
		if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil {
			t.Fatal(err)
		}
		full := domain.Refuse("not-enough-stock", "fewer units are available than the adjustment takes away")
		open := g.close()
		var wg sync.WaitGroup
		for i := range 9999 {
			wg.Go(func() {
				_, err := j.Handle(t.Context(), journaltest.Keyed("a", fmt.Sprint("k", i), ""),
					func(journaltest.Counter) ([]domain.Event, error) { return nil, full })
				if !errors.Is(err, full) {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		open()
		wg.Wait()
		if g.largest > 520<<10 {
			t.Errorf("a group makes a record of %d bytes", g.largest)
		}
	})
}

func TestWhatWasAcceptedBeforeANewerFormatIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := journal.NewMemory(journaltest.Partitions)
		s := &journaltest.Service{T: t, Log: log, Public: journal.NewMemory(journaltest.Partitions)}
		j := journal.New[journaltest.Counter](s.Config()) // folds, and does not publish yet
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = j.Run(ctx) })
		for range 3 {
			if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil {
				t.Fatal(err)
			}
		}
		newer := commit("a", "whatever", "", "", "", nil)
		newer.Headers[0].Value = []byte("2")
		put(t, log, newer)
		synctest.Wait()
		wg.Go(func() { j.Publish(ctx, newer.Partition) }) // one read brings all four records
		synctest.Wait()
		end, _ := s.Public.End(t.Context(), newer.Partition)
		cancel()
		wg.Wait()
		if end != 3 {
			t.Errorf("%d events are public, want the 3 that were accepted", end)
		}
	})
}

func TestAPanicInADecisionIsAnErrorOfItsCallAlone(t *testing.T) {
	s, _ := newService(t)
	j := s.Replica()
	_, err := j.Handle(t.Context(), journaltest.To("a"), func(journaltest.Counter) ([]domain.Event, error) { panic("a bug") })
	if err == nil {
		t.Error("no error")
	}
	if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil {
		t.Error(err)
	}
}

func TestIfMatchOnAStreamThatDoesNotExist(t *testing.T) {
	s, _ := newService(t)
	j := s.Replica()
	for match, want := range map[int64]error{7: commands.ErrPrecondition, commands.Existing: commands.ErrPrecondition, 0: nil} {
		c := journaltest.To(fmt.Sprint("stream", match))
		c.IfMatch = match
		if _, err := j.Handle(t.Context(), c, journaltest.Exist); !errors.Is(err, domain.ErrUnknown) {
			t.Errorf("If-Match %d of a command that finds nothing: %v", match, err)
		}
		if _, err := j.Handle(t.Context(), c, journaltest.Count(1, 9)); !errors.Is(err, want) {
			t.Errorf("If-Match %d: %v, want %v", match, err, want)
		}
	}
}

func TestTheNoteOfADecisionIsInEveryAnswerToItsKey(t *testing.T) {
	s, _ := newService(t)
	j, other := s.Replica(), s.Replica()
	for i, want := range []int{7, 7, 7} {
		c := journaltest.Keyed("a", "k", "")
		note := 0
		c.Note = &note
		r, err := []*journal.Journal[journaltest.Counter]{j, other, s.Replica()}[i].Handle(t.Context(), c,
			func(journaltest.Counter) ([]domain.Event, error) {
				note = 7 + i
				return []domain.Event{journaltest.Counted{By: 1}}, nil
			})
		if err != nil || r.Note != want {
			t.Errorf("try %d has the note %d: %v", i, r.Note, err)
		}
	}
}
