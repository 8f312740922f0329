package journaltest

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
)

func runProtocol(t *testing.T, topics Topics) {
	start := func(t *testing.T) *Service {
		log, public := topics(t, Partitions)
		return &Service{t, log, public}
	}

	t.Run("commands of many replicas to one stream all count, once", func(t *testing.T) {
		s := start(t)
		replicas := []*journal.Journal[Counter]{s.Replica(), s.Replica(), s.Replica()}
		const calls = 50
		var wg sync.WaitGroup
		for i, j := range replicas {
			for n := range calls {
				wg.Go(func() {
					for {
						_, err := j.Handle(t.Context(), Keyed("a", fmt.Sprint(i, "-", n), ""), Count(1, 1<<30))
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
		r, err := replicas[0].Handle(t.Context(), To("a"), Exist)
		if err != nil || r.Version != calls*3 {
			t.Fatalf("version %d after %d commands: %v", r.Version, calls*3, err)
		}
		for i, e := range s.Published("a", calls*3) {
			if e.Version != int64(i)+1 {
				t.Fatalf("event %d has version %d", i, e.Version)
			}
		}
	})

	t.Run("a limit holds against many replicas", func(t *testing.T) {
		s := start(t)
		replicas := []*journal.Journal[Counter]{s.Replica(), s.Replica()}
		const limit = 10
		var mu sync.Mutex
		counted := 0
		var wg sync.WaitGroup
		for n := range 60 {
			wg.Go(func() {
				for {
					_, err := replicas[n%2].Handle(t.Context(), To("a"), Count(1, limit))
					if errors.Is(err, commands.ErrConflict) {
						continue
					}
					if err != nil && !errors.Is(err, ErrFull) {
						t.Error(err)
					}
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						counted++
					}
					return
				}
			})
		}
		wg.Wait()
		if counted != limit {
			t.Errorf("%d commands were accepted, want %d", counted, limit)
		}
	})

	t.Run("what one replica was told, the other one knows", func(t *testing.T) {
		s := start(t)
		j, other := s.Replica(), s.Replica()
		for i := range 50 {
			stream := fmt.Sprint("s", i)
			if _, err := other.Handle(t.Context(), To(stream), Exist); !errors.Is(err, domain.ErrUnknown) {
				t.Fatal(err)
			}
			_, err := j.Handle(t.Context(), To(stream), Count(1, 9))
			must(t, err)
			// "There is nothing" would be an answer from a stale state.
			r, err := other.Handle(t.Context(), To(stream), Exist)
			if err != nil || r.Version != 1 {
				t.Fatalf("the other replica answers %v, %v", r, err)
			}
		}
	})

	t.Run("one key has one outcome", func(t *testing.T) {
		s := start(t)
		j, other := s.Replica(), s.Replica()
		first, err := j.Handle(t.Context(), Keyed("a", "k1", "count 2"), Count(2, 2))
		if err != nil || first.Version != 1 {
			t.Fatal(first, err)
		}
		if again, err := other.Handle(t.Context(), Keyed("a", "k1", "count 2"), Count(2, 2)); err != nil || again != first {
			t.Fatal("a retry is answered", again, err)
		}
		if _, err := other.Handle(t.Context(), Keyed("a", "k1", "count 3"), Count(3, 9)); !errors.Is(err, commands.ErrKeyReused) {
			t.Fatal(err)
		}
		if _, err := j.Handle(t.Context(), Keyed("a", "k2", "count 3"), Count(3, 2)); !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		// A refusal stands, though there would be room now, and so does a precondition that failed.
		if _, err := other.Handle(t.Context(), Keyed("a", "k2", "count 3"), Count(3, 99)); !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		c := Keyed("a", "k3", "count 1")
		c.IfMatch = 7
		if _, err := j.Handle(t.Context(), c, Count(1, 99)); !errors.Is(err, commands.ErrPrecondition) {
			t.Fatal(err)
		}
		c.IfMatch = 1
		if _, err := other.Handle(t.Context(), c, Count(1, 99)); !errors.Is(err, commands.ErrPrecondition) {
			t.Fatal("the key is not looked up before If-Match:", err)
		}
		// Nothing was done, and that too is remembered.
		noop, err := j.Handle(t.Context(), Keyed("a", "k4", "exist"), Exist)
		must(t, err)
		_, err = j.Handle(t.Context(), To("a"), Count(1, 99))
		must(t, err)
		if again, err := other.Handle(t.Context(), Keyed("a", "k4", "exist"), Exist); err != nil || again.Version != noop.Version {
			t.Fatal("a repeated no-op is answered", again, err)
		}
	})

	t.Run("one key at the same time has one outcome", func(t *testing.T) {
		s := start(t)
		replicas := []*journal.Journal[Counter]{s.Replica(), s.Replica()}
		receipts := make([]commands.Receipt, 40)
		var wg sync.WaitGroup
		for i := range receipts {
			wg.Go(func() {
				for {
					var err error
					receipts[i], err = replicas[i%2].Handle(t.Context(), Keyed("a", "k", "r"), Count(1, 99))
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
		wg.Wait()
		if slices.ContainsFunc(receipts, func(r commands.Receipt) bool { return r != receipts[0] || r.Version != 1 }) {
			t.Errorf("outcomes %v", receipts)
		}
	})

	t.Run("a stream remembers its creating key and the last others", func(t *testing.T) {
		s := start(t)
		j := s.Replica()
		for i := range journal.KeysPerStream + 2 {
			_, err := j.Handle(t.Context(), Keyed("a", fmt.Sprint("k", i), ""), Count(1, 9999))
			must(t, err)
		}
		for key, version := range map[string]int64{"k0": 1, "k2": 3, fmt.Sprint("k", journal.KeysPerStream+1): journal.KeysPerStream + 2} {
			if r, err := s.Replica().Handle(t.Context(), Keyed("a", key, ""), Count(1, 9999)); err != nil || r.Version != version {
				t.Errorf("%s is answered %v, %v", key, r, err)
			}
		}
	})

	t.Run("If-Match", func(t *testing.T) {
		s := start(t)
		j, other := s.Replica(), s.Replica()
		_, err := j.Handle(t.Context(), To("a"), Count(1, 9))
		must(t, err)
		c := To("a")
		c.IfMatch = 2
		if _, err := other.Handle(t.Context(), c, Count(1, 9)); !errors.Is(err, commands.ErrPrecondition) {
			t.Fatal(err)
		}
		c.IfMatch = 1
		if r, err := other.Handle(t.Context(), c, Count(1, 9)); err != nil || r.Version != 2 {
			t.Fatal(r, err)
		}
	})

	t.Run("a cause is handled once, on whichever replica", func(t *testing.T) {
		s := start(t)
		replicas := []*journal.Journal[Counter]{s.Replica(), s.Replica()}
		for i, seq := range []int64{3, 3, 2, 4, 4} {
			if _, err := replicas[i%2].Handle(t.Context(), Caused("a", 1, seq), Count(1, 99)); err != nil {
				t.Fatal(err)
			}
		}
		// Another partition counts for itself.
		r, err := replicas[0].Handle(t.Context(), Caused("a", 2, 1), Count(1, 99))
		if err != nil || r.Version != 3 {
			t.Fatal(r, err)
		}
		events := s.Published("a", 3)
		if events[0].Cause.Seq != 3 || events[1].Cause.Seq != 4 || events[2].Cause.Partition != 2 {
			t.Errorf("causes %v, %v, %v", events[0].Cause, events[1].Cause, events[2].Cause)
		}
	})

	t.Run("commands of one source are handled in order", func(t *testing.T) {
		s := start(t)
		j := s.Replica()
		var cs []commands.Command
		var ds []commands.Decision[Counter]
		for i := range 100 {
			cs, ds = append(cs, Caused("a", 0, int64(i+1))), append(ds, func(c Counter) ([]domain.Event, error) {
				if c.N%10 == 9 && i%10 != 9 {
					return nil, errors.New("out of order")
				}
				return []domain.Event{Counted{By: 1}}, nil
			})
		}
		for range 2 { // and again
			if n, err := j.HandleInOrder(t.Context(), cs, ds); n != 100 || err != nil {
				t.Fatal(n, err)
			}
		}
		for i, e := range s.Published("a", 100) {
			if e.Cause.Seq != int64(i)+1 {
				t.Fatalf("event %d was caused by %v", i, e.Cause)
			}
		}
	})

	t.Run("what comes after a command that failed is not handled", func(t *testing.T) {
		s := start(t)
		j := s.Replica()
		fail := errors.New("no outcome")
		cs := []commands.Command{Caused("a", 0, 1), Caused("a", 0, 2), Caused("a", 0, 3), Caused("a", 0, 4)}
		ds := []commands.Decision[Counter]{Count(1, 99), Count(100, 99), func(Counter) ([]domain.Event, error) { return nil, fail }, Count(1, 99)}
		if n, err := j.HandleInOrder(t.Context(), cs, ds); n != 2 || !errors.Is(err, fail) {
			t.Fatal("handled", n, err)
		}
		ds[2] = Count(5, 99)
		if n, err := j.HandleInOrder(t.Context(), cs, ds); n != 4 || err != nil {
			t.Fatal("handled", n, err)
		}
		for i, want := range []int64{1, 3, 4} {
			if e := s.Published("a", 3)[i]; e.Cause.Seq != want {
				t.Errorf("event %d was caused by %v", i, e.Cause)
			}
		}
	})

	t.Run("a watcher sees every open stream, and every change", func(t *testing.T) {
		s := start(t)
		j := s.Replica()
		_, err := j.Handle(t.Context(), To("a"), Count(1, 9))
		must(t, err)
		seen := make(chan string, 10)
		go j.Watch(t.Context(), journal.Partition([]byte("a"), Partitions), func(stream string, c Counter, at domain.Position) {
			seen <- fmt.Sprint(stream, c.N, " at ", at)
		})
		want := func(s string) {
			t.Helper()
			if got := <-seen; got != s {
				t.Fatalf("seen %s, want %s", got, s)
			}
		}
		at := journal.Partition([]byte("a"), Partitions)
		want(fmt.Sprintf("a1 at counters.events/%d/1", at))
		_, err = j.Handle(t.Context(), To("a"), Count(2, 9))
		must(t, err)
		want(fmt.Sprintf("a3 at counters.events/%d/2", at))
	})
}
