package journal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"wharf/commands"
	"wharf/domain"
)

var recordsTotal = promauto.NewCounterVec(prometheus.CounterOpts{
	Name: "wharf_journal_records_total",
	Help: "Journal records read, by what the acceptance rule made of them.",
}, []string{"service", "verdict"})

var quarantinedTotal = promauto.NewCounterVec(prometheus.CounterOpts{
	Name: "wharf_journal_quarantined_total",
	Help: "Accepted commits that could not be read. Each quarantines its stream.",
}, []string{"service"})

var haltedPartitions = promauto.NewGaugeVec(prometheus.GaugeOpts{
	Name: "wharf_journal_halted",
	Help: "1 while a partition of the journal has halted on a record of a newer format.",
}, []string{"service", "partition"})

func (p *partition[S]) haltedGauge(halted float64) {
	haltedPartitions.WithLabelValues(p.Service, strconv.Itoa(int(p.number))).Set(halted)
}

// partition is the fold of one partition of the journal, with the commands that wait for it. One mutex guards it all:
// every step is short, and none waits for the log.
type partition[S commands.State[S]] struct {
	*Journal[S]
	number int32
	counts [TooNew + 1]prometheus.Counter // by verdict

	mu      sync.Mutex
	streams streams[S]
	next    int64 // the fetch position: everything before it is folded
	seq     int64 // accepted events so far
	halted  error
	// ready says that what was the end when the fold began has been passed: before that, deciding is a waste.
	ready bool
	// ignored holds the offsets of all records that were not accepted, in order: with it the publisher can walk any
	// part of the log again without its heads. marks say how many events were accepted before some offsets.
	ignored []int64
	marks   []mark
	skips   map[int64]bool
	moved   chan struct{} // closed, and made anew, when next moves

	lanes      map[string]*lane[S]
	contests   map[string]*contest
	took       time.Duration // a commit, from its proposal to its fate, smoothed
	complained time.Time     // of a log out of reach
	calls      int
	barrier    barrier[S]
	watchers   map[*watcher]struct{}
}

// mark: before the record at offset, seq events had been accepted.
type mark struct{ offset, seq int64 }

const marksEvery = 1024 // offsets

func newPartition[S commands.State[S]](j *Journal[S], number int32) *partition[S] {
	p := &partition[S]{
		Journal: j, number: number,
		streams: streams[S]{byName: map[string]*stream[S]{}}, lanes: map[string]*lane[S]{}, contests: map[string]*contest{}, watchers: map[*watcher]struct{}{},
		skips: map[int64]bool{}, moved: make(chan struct{}),
	}
	for v := range p.counts {
		p.counts[v] = recordsTotal.WithLabelValues(j.Service, Verdict(v).String())
	}
	return p
}

// errSkipped restarts the reading behind a record that an operator had skipped.
var errSkipped = errors.New("skipped")

func (p *partition[S]) run(ctx context.Context) error {
	p.mu.Lock()
	p.join(nil) // makes the partition ready
	p.mu.Unlock()
	for {
		err := p.Log.Read(ctx, p.number, p.next, p.fold)
		if !errors.Is(err, errSkipped) {
			return err
		}
	}
}

func (p *partition[S]) state() (ready bool, halted error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ready, p.halted
}

// fold folds one batch in and then lets everything go on that waited for it.
func (p *partition[S]) fold(b Batch) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() {
		close(p.moved)
		p.moved = make(chan struct{})
	}()
	for _, r := range b.Records {
		if p.halted != nil {
			if skip(r) != p.next {
				continue // only an operator's word can help
			}
			p.Logger.Warn("an operator had a record skipped", "partition", p.number, "offset", p.next)
			p.skips[p.next], p.halted = true, nil
			p.haltedGauge(0)
			return errSkipped
		}
		if err := p.foldRecord(r); err != nil {
			// Reading goes on, to find the operator's word, but the fetch position stays in front of the record.
			p.next, p.halted = r.Offset, err
			p.haltedGauge(1)
			p.Logger.Error("halted: the journal was written by a newer program", "err", err)
			p.failAll(fmt.Errorf("%w: %w", commands.ErrNotReady, err))
		}
	}
	if p.halted == nil {
		p.next = b.Next
		p.barrier.passed(p)
	}
	return nil
}

func (p *partition[S]) foldRecord(r Record) error {
	if p.skips[r.Offset] {
		p.ignored = append(p.ignored, r.Offset)
		return nil
	}
	s := p.streams.byName[string(r.Key)] // which makes no string
	c, verdict := Judge(r, p.Partitions, func(string) Head {
		if s == nil {
			return Head{}
		}
		return s.Head
	})
	p.counts[verdict].Inc()
	switch verdict {
	case TooNew:
		return fmt.Errorf("record %s/%d/%d has a %s above %d, which this program does not know: upgrade it, or have "+
			"the record skipped if it is garbage", p.Service+".journal", r.Partition, r.Offset, headerFormat, Format)
	case Impossible:
		p.Logger.Error("a commit names a version that its stream never had: some writer is broken",
			"partition", p.number, "offset", r.Offset, "stream", string(r.Key))
	case Foreign, Malformed, Misplaced:
		if skip(r) < 0 {
			p.Logger.Warn("a record of the journal is ignored", "verdict", verdict.String(), "partition", p.number,
				"offset", r.Offset)
		}
	}
	if l := p.lanes[string(r.Key)]; verdict == Rejected && l != nil {
		p.rival(string(r.Key)) // or we ourselves have lost, and know
	}
	if verdict != Accepted {
		p.ignored = append(p.ignored, r.Offset)
		return nil
	}
	name := string(r.Key)
	if s == nil {
		s = p.streams.add(name)
	}
	if len(p.marks) == 0 || r.Offset-p.marks[len(p.marks)-1].offset >= marksEvery {
		p.marks = append(p.marks, mark{r.Offset, p.seq})
	}
	told, err := s.accept(c, r.Value, p.seq, p.Events)
	if err != nil {
		quarantinedTotal.WithLabelValues(p.Service).Inc()
		p.Logger.Error("a stream is quarantined: its commit cannot be read", "partition", p.number,
			"offset", r.Offset, "stream", name, "err", err)
	}
	before := p.seq
	p.seq += int64(c.Events)
	for w := range p.watchers {
		w.changed(name)
	}
	p.tell(name, c, told)
	p.resolve(name, c, before)
	return nil
}

// skip is the offset that an operator's record wants skipped, or -1.
func skip(r Record) int64 {
	h := headersOf(r)
	if n, ok := number(h.one(headerSkip)); ok && !h.malformed {
		return n
	}
	return -1
}

// NewSkipRecord is the record by which an operator has every reader pass over the record at the offset, on which it
// has halted because its format is unknown. Only readers that halted on that record heed it; so it is for garbage,
// not for the work of a newer program, which would have counted it.
func NewSkipRecord(partition int32, offset int64) Record {
	return Record{Partition: partition, Headers: []Header{{headerSkip, strconv.AppendInt(nil, offset, 10)}}}
}

func (p *partition[S]) position(seq int64) domain.Position {
	return domain.Position{Topic: p.Topic, Partition: p.number, Seq: seq}
}

// awaitPast waits until everything before the offset is folded.
func (p *partition[S]) awaitPast(ctx context.Context, offset int64) error {
	for {
		p.mu.Lock()
		next, moved := p.next, p.moved
		p.mu.Unlock()
		if next >= offset {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// folded is the offset before which everything is folded.
func (p *partition[S]) folded() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.next
}

// accepted says whether the record at a folded offset was accepted.
func (p *partition[S]) accepted(offset int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, found := slices.BinarySearch(p.ignored, offset)
	return !found
}

// markBefore is the last mark at or before the offset.
func (p *partition[S]) markBefore(offset int64) mark {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := sort.Search(len(p.marks), func(i int) bool { return p.marks[i].offset > offset })
	if i == 0 {
		return mark{}
	}
	return p.marks[i-1]
}

// watcher collects the names of streams that changed.
type watcher struct {
	dirty map[string]struct{}
	wake  chan struct{}
}

func (w *watcher) changed(stream string) {
	w.dirty[stream] = struct{}{}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (p *partition[S]) watch(ctx context.Context, f func(stream string, state S, at domain.Position)) {
	w := &watcher{map[string]struct{}{}, make(chan struct{}, 1)}
	p.mu.Lock()
	p.watchers[w] = struct{}{}
	for name, s := range p.streams.byName {
		if !s.quarantined() && !s.state.Closed() {
			w.changed(name)
		}
	}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.watchers, w)
		p.mu.Unlock()
	}()
	type change struct {
		stream string
		state  S
		at     domain.Position
	}
	for {
		select {
		case <-w.wake:
		case <-ctx.Done():
			return
		}
		var changes []change
		p.mu.Lock()
		for name := range w.dirty {
			if s := p.streams.byName[name]; !s.quarantined() {
				changes = append(changes, change{name, s.state, p.position(s.seq)})
			}
		}
		clear(w.dirty)
		p.mu.Unlock()
		for _, c := range changes {
			if ctx.Err() != nil {
				return
			}
			f(c.stream, c.state, c.at)
		}
	}
}
