package journal_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

// faulty is a log on which what happens to an append is the test's decision.
type faulty struct {
	*journal.Memory
	mu    sync.Mutex
	fault func(context.Context, journal.Record) fault // called one at a time
}

type fault int

const (
	none      fault = iota
	lost            // not appended, and an error
	unknown         // appended, and an error
	doubled         // appended twice
	delayed         // an error, and appended some time later
	refused         // not appended, for good
	refusedIn       // refused, though an earlier try got in
)

var errNetwork = errors.New("the network")

func (f *faulty) Append(ctx context.Context, r journal.Record) error {
	f.mu.Lock()
	what := f.fault(ctx, r)
	f.mu.Unlock()
	in := func() { _ = f.Memory.Append(context.WithoutCancel(ctx), r) }
	switch what {
	case none:
		return f.Memory.Append(ctx, r)
	case lost:
		return errNetwork
	case unknown:
		in()
		return errNetwork
	case doubled:
		in()
		in()
		return nil
	case delayed:
		go func() {
			time.Sleep(time.Duration(rand.Int64N(int64(20 * time.Millisecond)))) // the network's, not the test's
			in()
		}()
		return errNetwork
	case refusedIn:
		in()
	}
	return fmt.Errorf("%w: too large", journal.ErrRefused)
}

func newFaulty(t testing.TB, what func(context.Context, journal.Record) fault) (*journaltest.Service, *faulty) {
	log := &faulty{Memory: journal.NewMemory(journaltest.Partitions), fault: what}
	return &journaltest.Service{T: t, Log: log, Public: journal.NewMemory(journaltest.Partitions)}, log
}

func TestNoFaultOfTheLogLosesOrDoublesACommand(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		// One in `odds` appends goes wrong.
		odds := rapid.IntRange(2, 6).Draw(rt, "odds")
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
		s, _ := newFaulty(t, func(context.Context, journal.Record) fault {
			if random.IntN(odds) > 0 {
				return none
			}
			return []fault{lost, unknown, doubled, delayed}[random.IntN(4)]
		})
		a, stopA := s.Start(s.Config())
		b, stopB := s.Start(s.Config())
		replicas := []*journal.Journal[journaltest.Counter]{a, b}
		const calls = 20
		var wg sync.WaitGroup
		for n := range calls {
			wg.Go(func() {
				for try := 0; ; try++ {
					_, err := replicas[(n+try)%2].Handle(t.Context(), journaltest.Keyed("a", fmt.Sprint(n), ""), journaltest.Count(1, 1<<20))
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
		events := s.Published("a", calls)
		r, err := a.Handle(t.Context(), journaltest.To("a"), journaltest.Exist)
		if err != nil || r.Version != calls || len(events) != calls {
			rt.Fatalf("version %d, want %d: %v", r.Version, calls, err)
		}
		stopA()
		stopB()
	})
}

func TestOutOfTimeIsUnknown(t *testing.T) {
	release := make(chan struct{})
	held := make(chan struct{}, 1)
	s, log := newFaulty(t, nil)
	log.fault = func(ctx context.Context, _ journal.Record) fault {
		select {
		case held <- struct{}{}:
		default:
		}
		select {
		case <-release:
			return none
		case <-ctx.Done():
			return lost
		}
	}
	j := s.Replica()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-held; cancel() }()
	c := journaltest.Keyed("a", "k", "r")
	if _, err := j.Handle(ctx, c, journaltest.Count(1, 9)); !errors.Is(err, commands.ErrUnknownOutcome) {
		t.Fatal(err)
	}
	close(release)
	// The commit was sent, and lands; the retry finds its outcome.
	if r, err := j.Handle(t.Context(), c, journaltest.Count(1, 9)); err != nil || r.Version != 1 {
		t.Fatal(r, err)
	}
	if r, err := s.Replica().Handle(t.Context(), journaltest.To("a"), journaltest.Exist); err != nil || r.Version != 1 {
		t.Fatal(r, err)
	}
}

// A commit is under way when its command is retried elsewhere and refused there. The refusal has been told, so the
// commit must not count when it lands at last.
func TestARefusalFencesOffACommitInTheNetwork(t *testing.T) {
	s, log := newFaulty(t, func(context.Context, journal.Record) fault { return none })
	other := s.Replica()
	if _, err := other.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil {
		t.Fatal(err)
	}
	var late journal.Record
	sent := make(chan struct{})
	slow := s.Config()
	slow.Log = &faulty{Memory: log.Memory, fault: func(_ context.Context, r journal.Record) fault {
		if late.Key == nil {
			late = r
			close(sent)
		}
		return lost
	}}
	j, stop := s.Start(slow)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-sent; cancel() }()
	c := journaltest.Keyed("a", "k", "r")
	if _, err := j.Handle(ctx, c, journaltest.Count(1, 9)); !errors.Is(err, commands.ErrUnknownOutcome) {
		t.Fatal(err)
	}
	stop()
	if _, err := other.Handle(t.Context(), c, journaltest.Count(1, 1)); !errors.Is(err, journaltest.ErrFull) {
		t.Fatal(err)
	}
	if err := log.Memory.Append(t.Context(), late); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Replica().Handle(t.Context(), journaltest.To("a"), journaltest.Exist); err != nil || r.Version != 1 {
		t.Fatal("the late commit counts:", r, err)
	}
	if _, err := other.Handle(t.Context(), c, journaltest.Count(1, 9)); !errors.Is(err, journaltest.ErrFull) {
		t.Fatal("the refusal does not stand:", err)
	}
}

func TestARefusedRecordIsGivenUpByAFence(t *testing.T) {
	for what, want := range map[fault]error{refused: commands.ErrTooLarge, refusedIn: nil} {
		once := true
		s, _ := newFaulty(t, func(context.Context, journal.Record) fault {
			if once {
				once = false
				return what
			}
			return none
		})
		j := s.Replica()
		_, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9))
		if !errors.Is(err, want) {
			t.Errorf("fault %d: %v, want %v", what, err, want)
		}
		r, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9))
		if wantVersion := map[bool]int64{true: 2, false: 1}[want == nil]; err != nil || r.Version != wantVersion {
			t.Errorf("fault %d: the stream goes on with %v, %v", what, r, err)
		}
	}
}

// commit is a journal record, spelled out.
func commit(stream, id, parent, version, events string, value []byte) journal.Record {
	h := func(k, v string) journal.Header { return journal.Header{Key: k, Value: []byte(v)} }
	return journal.Record{
		Partition: journal.Partition([]byte(stream), journaltest.Partitions), Key: []byte(stream), Value: value,
		Headers: []journal.Header{h("wharf-format", "1"), h("wharf-commit", id), h("wharf-parent", parent),
			h("wharf-version", version), h("wharf-events", events), h("wharf-partitions", fmt.Sprint(journaltest.Partitions))},
	}
}

func newID() string { return uuid.Must(uuid.NewV7()).String() }

func newService(t testing.TB) (*journaltest.Service, *journal.Memory) {
	log := journal.NewMemory(journaltest.Partitions)
	return &journaltest.Service{T: t, Log: log, Public: journal.NewMemory(journaltest.Partitions)}, log
}

func put(t testing.TB, log *journal.Memory, r journal.Record) int64 {
	t.Helper()
	end, _ := log.End(t.Context(), r.Partition)
	if err := log.Append(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	return end
}

// neighbour is another stream of the same partition.
func neighbour(stream string) string {
	for i := 0; ; i++ {
		n := fmt.Sprint(stream, i)
		if journal.Partition([]byte(n), journaltest.Partitions) == journal.Partition([]byte(stream), journaltest.Partitions) {
			return n
		}
	}
}

func TestABrokenFrameQuarantinesItsStreamAlone(t *testing.T) {
	s, log := newService(t)
	put(t, log, commit("a", newID(), "", "0", "3", []byte("no frame")))
	j := s.Replica()
	if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); !errors.Is(err, commands.ErrQuarantined) {
		t.Fatal(err)
	}
	b := neighbour("a")
	if _, err := j.Handle(t.Context(), journaltest.To(b), journaltest.Count(1, 9)); err != nil {
		t.Fatal(err)
	}
	// The count of public events stays dense, and every publisher makes the same of it.
	events := s.Published("a", 4)
	for i, e := range events[:3] {
		if e.Name != journal.Unreadable || e.Stream != "a" || e.Version != int64(i)+1 || e.Index != i {
			t.Errorf("event %d is %+v", i, e)
		}
	}
	if events[3].Stream != b || events[3].Seq != 4 {
		t.Errorf("the next event is %+v", events[3])
	}
}

func TestWhatIsNoCommitIsIgnored(t *testing.T) {
	s, log := newService(t)
	good := commit("a", newID(), "", "0", "1", nil)
	drop := func(key string) journal.Record {
		r := good
		r.Headers = nil
		for _, h := range good.Headers {
			if h.Key != key {
				r.Headers = append(r.Headers, h)
			}
		}
		return r
	}
	with := func(key, value string) journal.Record {
		r := drop(key)
		r.Headers = append(r.Headers, journal.Header{Key: key, Value: []byte(value)})
		return r
	}
	twice := good
	twice.Headers = append(twice.Headers[:len(twice.Headers):len(twice.Headers)], journal.Header{Key: "wharf-events", Value: []byte("1")})
	misplaced := good
	misplaced.Partition = (good.Partition + 1) % journaltest.Partitions
	noKey := good
	noKey.Key = nil
	for _, r := range []journal.Record{
		drop("wharf-format"), with("wharf-format", "0"), with("wharf-format", "x"), with("wharf-format", "01"), with("wharf-format", "-1"),
		drop("wharf-commit"), with("wharf-commit", "x"), with("wharf-commit", uuid.NewString()), with("wharf-commit", strings.ToUpper(newID())),
		drop("wharf-parent"), with("wharf-parent", "x"), with("wharf-parent", newID()),
		drop("wharf-version"), with("wharf-version", "1"), with("wharf-version", "-0"), with("wharf-version", "+0"), with("wharf-version", "9999999999999999999"),
		drop("wharf-events"), with("wharf-events", "10001"), with("wharf-events", ""), with("wharf-events", " 1"),
		drop("wharf-partitions"), with("wharf-partitions", "4"), twice, misplaced, noKey,
	} {
		put(t, log, r)
	}
	if r, err := s.Replica().Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil || r.Version != 1 {
		t.Fatal(r, err)
	}
	if e := s.Published("a", 1)[0]; e.Name != "counter.counted.v1" {
		t.Errorf("published is %+v", e)
	}
}

func TestANewerFormatHaltsThePartitionUntilAnOperatorHasItSkipped(t *testing.T) {
	s, log := newService(t)
	j := s.Replica()
	if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil {
		t.Fatal(err)
	}
	newer := commit("a", "whatever", "", "", "", nil)
	newer.Headers[0].Value = []byte("2")
	at := put(t, log, newer)
	put(t, log, commit(neighbour("a"), newID(), "", "0", "0", nil))
	ctx, cancel := context.WithTimeout(t.Context(), journaltest.Patience)
	defer cancel()
	if _, err := j.Handle(ctx, journaltest.To("a"), journaltest.Exist); !errors.Is(err, commands.ErrNotReady) || ctx.Err() != nil {
		t.Fatal("a command to a partition that must halt:", err)
	}
	if err := j.Halted(); err == nil || !strings.Contains(err.Error(), fmt.Sprint("/", at, " ")) {
		t.Fatal("it does not say where it has halted:", err)
	}
	// Other partitions go on.
	for _, b := range []string{"b", "c", "d", "e"} {
		if journal.Partition([]byte(b), journaltest.Partitions) == journal.Partition([]byte("a"), journaltest.Partitions) {
			continue
		}
		if _, err := j.Handle(t.Context(), journaltest.To(b), journaltest.Count(1, 9)); err != nil {
			t.Fatal(err)
		}
	}
	put(t, log, journal.NewSkipRecord(newer.Partition, at+1)) // of another offset: heeded by nobody
	for fresh := s.Replica(); fresh.Halted() == nil || !strings.Contains(fresh.Halted().Error(), fmt.Sprint("/", at, " ")); {
		if _, err := fresh.Handle(t.Context(), journaltest.To("a"), journaltest.Exist); err == nil {
			t.Fatal("the record is skipped without a word")
		}
	}
	put(t, log, journal.NewSkipRecord(newer.Partition, at))
	for _, replica := range []*journal.Journal[journaltest.Counter]{j, s.Replica()} {
		for {
			r, err := replica.Handle(t.Context(), journaltest.To("a"), journaltest.Exist)
			if errors.Is(err, commands.ErrNotReady) {
				continue // the word has not been read yet
			}
			if err != nil || r.Version != 1 {
				t.Fatal(r, err)
			}
			break
		}
	}
	if r, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil || r.Version != 2 {
		t.Fatal(r, err)
	}
	s.Published("a", 2)
}

// A publisher goes on behind the last record that is its own, whatever lies around it.
func TestAPublisherResumesFromTheTailOfItsOwnOutput(t *testing.T) {
	s, _ := newService(t)
	j, stop := s.Start(s.Config())
	const n = 200
	for range n {
		if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	events := s.Published("a", n)
	stop()
	p := events[0].Partition
	forge := func(change func(*domain.Recorded)) journal.Record {
		e := events[n-1]
		change(&e)
		return journal.NewEventRecord(e)
	}
	err := s.Public.AppendBatch(t.Context(), p, []journal.Record{
		{Partition: p, Key: []byte("x"), Value: []byte("foreign")},
		forge(func(e *domain.Recorded) { e.Seq, e.Offset = 999, 999 }),
		forge(func(e *domain.Recorded) { e.Seq = 5 }),
		forge(func(e *domain.Recorded) { e.Index = 7 }),
		forge(func(e *domain.Recorded) { e.Offset = -1 }),
		forge(func(e *domain.Recorded) { e.Data = []byte("{}") }),
		forge(func(e *domain.Recorded) { e.Offset, e.Index = events[4].Offset, events[4].Index }),
	})
	if err != nil {
		t.Fatal(err)
	}
	before, _ := s.Public.End(t.Context(), p)
	j, stop = s.Start(s.Config())
	if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 1<<20)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), journaltest.Patience)
	defer cancel()
	var next domain.Recorded
	done := errors.New("done")
	if err := s.Public.Read(ctx, p, before, func(b journal.Batch) error {
		next, _ = journal.ParseEvent("counters.events", b.Records[0])
		return done
	}); !errors.Is(err, done) {
		t.Fatal(err)
	}
	if next.Seq != n+1 {
		t.Errorf("it goes on with event %d, want %d", next.Seq, n+1)
	}
	stop()
}

// flaky is a public log that answers some batches with an error, appended or not.
type flaky struct {
	*journal.Memory
	random *rand.Rand
}

func (f *flaky) AppendBatch(ctx context.Context, p int32, rs []journal.Record) error {
	switch f.random.IntN(4) {
	case 0:
		return errNetwork
	case 1:
		_ = f.Memory.AppendBatch(ctx, p, rs)
		return errNetwork
	}
	return f.Memory.AppendBatch(ctx, p, rs)
}

func TestNothingIsMissingFromThePublicLog(t *testing.T) {
	s, _ := newService(t)
	public := s.Public.(*journal.Memory)
	s.Public = &flaky{public, rand.New(rand.NewPCG(1, 1))}
	j, stop := s.Start(s.Config()) // one replica: its publishers of other partitions have nothing to do
	const n = 60
	for range n {
		if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	for i, e := range s.Published("a", n) {
		if e.Seq != int64(i)+1 {
			t.Fatalf("event %d has the count %d", i, e.Seq)
		}
	}
	stop()
}

func TestAClosedStreamForgetsItsCausesAndNothingElse(t *testing.T) {
	s, _ := newService(t)
	j := s.Replica()
	finish := func(c journaltest.Counter) ([]domain.Event, error) {
		if c.Done {
			return nil, nil
		}
		return []domain.Event{journaltest.Finished{}}, nil
	}
	for range 2 {
		if _, err := j.Handle(t.Context(), journaltest.Caused("a", 0, 1), finish); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := j.Handle(t.Context(), journaltest.Keyed("a", "k", ""), finish); err != nil || r.Version != 1 {
		t.Fatal(r, err)
	}
}

func TestTooManyCallsAreTurnedAway(t *testing.T) {
	s, log := newFaulty(t, nil)
	held := make(chan struct{}, 100)
	release := make(chan struct{})
	log.fault = func(ctx context.Context, _ journal.Record) fault {
		held <- struct{}{}
		select {
		case <-release:
		case <-ctx.Done():
		}
		return none
	}
	c := s.Config()
	c.MaxCalls = 1
	j, _ := s.Start(c)
	first := make(chan error)
	go func() {
		_, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9))
		first <- err
	}()
	<-held
	if _, err := j.Handle(t.Context(), journaltest.To(neighbour("a")), journaltest.Count(1, 9)); !errors.Is(err, commands.ErrNotReady) {
		t.Error(err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil {
		t.Error("there is room again, and:", err)
	}
}

func TestTheConsumerRule(t *testing.T) {
	event := func(seq int64) domain.Recorded {
		return domain.Recorded{Position: domain.Position{Topic: "t", Seq: seq}}
	}
	for seq, want := range map[int64]bool{1: false, 4: false, 5: false, 6: true} {
		if process, err := journal.Next(5, event(seq)); process != want || err != nil {
			t.Errorf("event %d after 5: %v, %v", seq, process, err)
		}
	}
	if _, err := journal.Next(5, event(7)); err == nil {
		t.Error("event 7 after 5: the gap is not noticed")
	}
}

// A time whose zone makes it the year 10000 could be stored in a row, and not be read back.
func TestATimeThatCannotBeWrittenMakesNoEvent(t *testing.T) {
	r := journal.NewEventRecord(domain.Recorded{ID: uuid.New(), Name: "counted.v1", Service: "counters", Stream: "a", Version: 1,
		Position: domain.Position{Topic: "counters.events", Seq: 1}})
	for text, ours := range map[string]bool{
		"9999-12-31T23:59:59Z": true, "9999-12-31T23:59:59-14:00": false, "0000-01-01T00:00:00+14:00": false, "0000-01-01T00:00:00Z": true,
	} {
		i := slices.IndexFunc(r.Headers, func(h journal.Header) bool { return h.Key == "ce_time" })
		r.Headers[i].Value = []byte(text)
		if _, ok := journal.ParseEvent("counters.events", r); ok != ours {
			t.Errorf("%s makes an event: %v, want %v", text, ok, ours)
		}
	}
}

// Consumers count events: those of a journal that was made anew would be passed over without a word.
func TestNothingIsPublishedBehindTheEventsOfAnotherJournal(t *testing.T) {
	s, _ := newService(t)
	j, stop := s.Start(s.Config())
	if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil {
		t.Fatal(err)
	}
	p := s.Published("a", 1)[0].Partition
	stop()
	before, _ := s.Public.End(t.Context(), p)
	s.Log = journal.NewMemory(journaltest.Partitions)
	said := make(chan string, 1)
	c := s.Config()
	c.Logger = slog.New(slog.NewTextHandler(writer(func(line string) {
		select {
		case said <- line:
		default:
		}
	}), nil))
	j, stop = s.Start(c)
	defer stop()
	if _, err := j.Handle(t.Context(), journaltest.To("a"), journaltest.Count(1, 9)); err != nil {
		t.Fatal(err)
	}
	if line := <-said; !strings.Contains(line, "made anew") {
		t.Error(line)
	}
	if end, _ := s.Public.End(t.Context(), p); end != before {
		t.Errorf("%d events were published", end-before)
	}
}

type writer func(string)

func (w writer) Write(b []byte) (int, error) { w(string(b)); return len(b), nil }
