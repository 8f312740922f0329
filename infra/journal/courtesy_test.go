package journal_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"wharf/commands"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

// far is a log that takes a while, and that can be out of reach.
type far struct {
	*journal.Memory
	latency time.Duration
	mu      sync.Mutex
	away    bool
	commits int
	parents map[string]bool // of the commits: only one commit is accepted on each
}

func (f *far) Append(ctx context.Context, r journal.Record) error {
	time.Sleep(f.latency) // virtual
	f.mu.Lock()
	away := f.away
	f.commits++
	for _, h := range r.Headers {
		if h.Key == "wharf-parent" && f.parents != nil {
			f.parents[string(h.Value)] = true
		}
	}
	f.mu.Unlock()
	if away {
		return errNetwork
	}
	return f.Memory.Append(ctx, r)
}

// Two replicas share a stream, and neither waits for long, nor is much work wasted: one has many callers, or one who
// sends one command after the other; the other one has few, who think in between.
func TestReplicasThatShareAStreamTakeTurns(t *testing.T) {
	for _, latency := range []time.Duration{5 * time.Millisecond, 50 * time.Millisecond, 150 * time.Millisecond} {
		for _, callers := range [][2]int{{4, 1}, {1, 1}, {64, 64}} {
			synctest.Test(t, func(t *testing.T) {
				log := &far{Memory: journal.NewMemory(journaltest.Partitions), latency: latency, parents: map[string]bool{}}
				public := journal.NewMemory(journaltest.Partitions)
				var wg sync.WaitGroup
				var mu sync.Mutex
				var done, failed [2]int
				var longest [2]time.Duration
				end := time.Now().Add(time.Minute)
				for i := range callers {
					j := (&journaltest.Service{T: t, Log: log, Public: public}).Replica()
					for range callers[i] {
						wg.Go(func() {
							for time.Now().Before(end) {
								began := time.Now()
								_, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 1<<30))
								if err != nil && !errors.Is(err, commands.ErrConflict) {
									t.Error(err)
								}
								mu.Lock()
								if longest[i] = max(longest[i], time.Since(began)); err == nil {
									done[i]++
								} else {
									failed[i]++
								}
								mu.Unlock()
								time.Sleep(time.Duration(i) * latency / 2)
							}
						})
					}
				}
				wg.Wait()
				wasted := log.commits - len(log.parents)
				t.Logf("%s, %v callers: done %v, failed %v, longest wait %v, %d of %d commits wasted", latency, callers, done,
					failed, longest, wasted, log.commits)
				if wasted*10 > log.commits {
					t.Errorf("%s, %v callers: %d of %d commits were proposed in vain", latency, callers, wasted, log.commits)
				}
				for i := range callers {
					if least := int(time.Minute / latency / 20); done[i] < least || failed[i]*100 > done[i] || longest[i] > max(5*time.Second, 100*latency) {
						t.Errorf("%s, %v callers: replica %d has %d done (want %d) and %d failed, and waited for %s",
							latency, callers, i, done[i], least, failed[i], longest[i])
					}
				}
			})
		}
	}
}

// How long a log was out of reach says nothing about how long commits take.
func TestAnOutageIsOverWhenItIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &far{Memory: journal.NewMemory(journaltest.Partitions), latency: 5 * time.Millisecond}
		public := journal.NewMemory(journaltest.Partitions)
		a := (&journaltest.Service{T: t, Log: log, Public: public}).Replica()
		b := (&journaltest.Service{T: t, Log: log, Public: public}).Replica()
		set := func(away bool) { log.mu.Lock(); log.away = away; log.mu.Unlock() }
		set(true)
		var wg sync.WaitGroup
		for i := range 60 {
			for _, j := range []*journal.Journal[journaltest.Counter]{a, b} {
				stream := []string{"a", neighbour("a")}[i%2]
				wg.Go(func() {
					if _, err := j.Handle(t.Context(), journaltest.To(stream), journaltest.Count(1, 1<<30)); err != nil {
						t.Error(err)
					}
				})
			}
		}
		time.Sleep(time.Minute)
		set(false)
		back := time.Now()
		wg.Wait()
		if took := time.Since(back); took > 5*time.Second {
			t.Errorf("the last command was answered %s after the log was back", took)
		}
	})
}

func TestWhatIsTooMuchForOneBatchIsPublishedInSeveral(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &far{Memory: journal.NewMemory(journaltest.Partitions), latency: 50 * time.Millisecond}
		s := &journaltest.Service{T: t, Log: log, Public: journal.NewMemory(journaltest.Partitions)}
		j := s.Replica()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				ask := journaltest.Ask{Stream: "a", What: journaltest.Add, By: 1, Limit: 9, Parts: 2000, IfMatch: commands.AnyVersion}
				if _, err := j.Handle(t.Context(), ask.Command(), ask.Decide); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		ids := map[string]bool{}
		for _, e := range s.Published("a", 6000) {
			ids[e.ID.String()] = true
			if e.Time.Before(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)) {
				t.Fatalf("event %d is of %s", e.Seq, e.Time)
			}
		}
		if len(ids) != 6000 {
			t.Errorf("6000 events have %d ids", len(ids))
		}
	})
}
