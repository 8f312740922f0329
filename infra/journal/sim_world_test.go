package journal_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

// world is one run of the simulation: a few replicas of a service with the journal's production code, on two
// simulated topics, with clients and policies that use them. Whatever a replica asks of a topic waits until the
// scheduler picks it, one thing at a time; time stands still until the scheduler lets it pass. All choices come from
// one seed, and none depends on which goroutine is faster, so a seed is a run that can be repeated.
type world struct {
	rnd    *rand.Rand
	step   int64
	steps  int64 // of chaos; after that everything is left to come to rest
	faults map[string]bool
	holes  bool
	trace  []string
	hash   [32]byte
	tell   bool // keep the trace

	journal, public *topic
	streams         []string
	replicas        []*replica // by slot; nil is down
	incarnations    int
	clients         []*client
	sources         []*source
	history         journaltest.History
	strays          []stray
	pending         []*request       // those of this step
	refused         map[string]bool  // commits
	sent            map[string]int64 // commit: step of its first append
	oracle          [simPartitions]*verdict
	prints          map[string]string // partition and offset: fingerprint
	oldVocabulary   bool              // the replica in slot 0 does not know every event
	created         map[string]bool   // streams that somebody was told of
	wishes          int
	poisoned        map[string]bool // streams
	violation       error

	mu       sync.Mutex // of what goroutines other than the scheduler touch
	requests []*request
}

const simPartitions = 2

// The faults of the simulation, by name. A seed draws which of them occur, and how often.
var allFaults = []string{"append", "refused", "end", "slow", "crash", "pause", "impatience", "garbage", "newer format",
	"poison", "holes", "publishers", "rebalance", "bugs", "old vocabulary", "time"}

func newWorld(seed uint64, steps int64, without map[string]bool) *world {
	w := &world{
		rnd: rand.New(rand.NewPCG(seed, 0x5eed)), steps: steps, faults: map[string]bool{},
		journal: newTopic("counters.journal", simPartitions), public: newTopic("counters.events", simPartitions),
		refused: map[string]bool{}, sent: map[string]int64{}, prints: map[string]string{}, created: map[string]bool{},
		poisoned: map[string]bool{},
	}
	w.history.Clock = func() int64 { return w.step }
	if drawn := 100 + w.rnd.Int64N(500); w.steps == 0 {
		w.steps = drawn
	}
	rare := map[string]int{"newer format": 12, "poison": 8, "old vocabulary": 10}
	for _, f := range allFaults {
		w.faults[f] = w.rnd.IntN(cmpOr(rare[f], 2)) == 0 && !without[f]
	}
	w.holes, w.oldVocabulary = w.faults["holes"], w.faults["old vocabulary"]
	for i := range 2 + w.rnd.IntN(4) {
		w.streams = append(w.streams, fmt.Sprint("s", i))
	}
	w.replicas = make([]*replica, 1+w.rnd.IntN(3))
	for i := range 1 + w.rnd.IntN(6) {
		w.clients = append(w.clients, &client{w: w, number: i})
	}
	if w.rnd.IntN(2) == 0 {
		// Causes differ by topic, by partition, or by consumer group alone.
		all := []*source{{topic: "alpha.events", group: "policies"}, {topic: "beta.events", group: "policies"},
			{topic: "alpha.events", partition: 1, group: "policies"}, {topic: "alpha.events", group: "others"}}
		w.rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		w.sources = all[:1+w.rnd.IntN(3)]
		for i, s := range w.sources {
			s.w, s.number = w, i
		}
	}
	return w
}

func cmpOr(n, otherwise int) int {
	if n == 0 {
		return otherwise
	}
	return n
}

// replica is one incarnation of a process.
type replica struct {
	w       *world
	slot    int
	name    string
	journal *journal.Journal[journaltest.Counter]
	ctx     context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup
	paused  bool
	read    int // how eagerly it reads
	// publishers by partition; several at a time are allowed.
	publishers []*publisher
	started    int // publishers so far
}

type publisher struct {
	partition int32
	stop      context.CancelFunc
}

func (w *world) start(slot int) {
	w.incarnations++
	r := &replica{w: w, slot: slot, name: fmt.Sprintf("%c%d", 'A'+slot, w.incarnations), read: 4}
	if w.faults["slow"] {
		r.read = 1 + w.rnd.IntN(6)
	}
	ids := &idSource{random: rand.New(rand.NewPCG(w.rnd.Uint64(), 7))}
	vocabulary := journaltest.Events
	if w.oldVocabulary && slot == 0 {
		vocabulary = domain.EventsOf(journaltest.Counted{})
	}
	r.ctx, r.stop = context.WithCancel(context.WithValue(context.Background(), labelKey{}, "fold"))
	r.journal = journal.New[journaltest.Counter](journal.Config{
		Service: "counters", Topic: "counters.events", Partitions: simPartitions, Events: vocabulary,
		Log: simLog{w, r, w.journal}, Public: simLog{w, r, w.public},
		NewID: ids.next, Jitter: ids.below, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	w.replicas[slot] = r
	r.wg.Go(func() {
		if err := r.journal.Run(r.ctx); err != nil {
			w.violate(fmt.Errorf("replica %s ended: %w", r.name, err))
		}
	})
	w.say("replica %s starts", r.name)
	for p := range int32(simPartitions) {
		if slot == 0 || w.faults["publishers"] && w.rnd.IntN(2) == 0 {
			r.publish(p)
		}
	}
}

func (r *replica) publish(partition int32) {
	r.started++
	ctx, stop := context.WithCancel(context.WithValue(r.ctx, labelKey{}, fmt.Sprint("publisher ", r.started)))
	p := &publisher{partition, stop}
	r.publishers = append(r.publishers, p)
	r.wg.Go(func() { r.journal.Publish(ctx, partition) })
}

// crash ends the process. Its clients get no answer.
func (w *world) crash(r *replica) {
	w.replicas[r.slot] = nil
	for _, c := range w.clients {
		if c.at == r && c.attempt != nil {
			c.cut = true
			c.cancel()
		}
	}
	r.stop()
	synctest.Wait()
	r.wg.Wait()
}

// idSource makes ids and random numbers from a seed.
type idSource struct {
	mu     sync.Mutex
	random *rand.Rand
}

func (s *idSource) next() (id uuid.UUID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	binary.BigEndian.PutUint64(id[:], s.random.Uint64())
	binary.BigEndian.PutUint64(id[8:], s.random.Uint64())
	id[6], id[8] = id[6]&0x0f|0x70, id[8]&0x3f|0x80
	return id
}

func (s *idSource) below(n int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.random.Int64N(n)
}

func (w *world) violate(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.violation == nil {
		w.violation = err
	}
}

func (w *world) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.violation
}

// say adds a line to the trace. Two runs of a seed have the same hash.
func (w *world) say(format string, args ...any) {
	line := fmt.Sprintf("%5d  %s", w.step, fmt.Sprintf(format, args...))
	w.hash = sha256.Sum256(append(w.hash[:], line...))
	if w.tell {
		w.trace = append(w.trace, line)
	}
}

// client is somebody who asks one thing at a time, and asks again with the same key when it has one and no answer.
type client struct {
	w       *world
	number  int
	at      *replica
	cancel  context.CancelFunc
	attempt *journaltest.Attempt
	cut     bool // its connection broke
	wish    journaltest.Ask
	again   bool // the wish has no answer yet, and a key
	tries   int

	mu      sync.Mutex
	done    bool
	receipt commands.Receipt
	err     error
}

func (c *client) busy() bool { return c.attempt != nil }

// ask sends the wish to the replica.
func (c *client) ask(r *replica) {
	ctx, cancel := context.WithCancel(context.Background())
	c.at, c.cancel, c.cut = r, cancel, false
	c.attempt = c.w.history.Call(c.number, c.wish)
	c.tries++
	c.w.say("client %d asks %s: %s", c.number, r.name, c.wish)
	r.wg.Go(func() {
		receipt, err := r.journal.Handle(ctx, c.wish.Command(), c.wish.Decide)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.done, c.receipt, c.err = true, receipt, err
	})
}

// hear takes the answer, if it is there.
func (c *client) hear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.attempt == nil || !c.done && !c.cut {
		return
	}
	if c.cut {
		c.err = commands.ErrUnknownOutcome // whatever the replica has said, nobody has heard it
	}
	c.cancel()
	c.attempt.Return(c.receipt, c.err)
	c.w.say("client %d hears %v, %v", c.number, c.receipt, c.err)
	open := errors.Is(c.err, commands.ErrUnknownOutcome) || errors.Is(c.err, commands.ErrConflict) || errors.Is(c.err, commands.ErrNotReady)
	c.again = c.wish.Key != "" && open
	if errors.Is(c.err, commands.ErrQuarantined) && !c.w.poisoned[c.wish.Stream] && !c.w.oldVocabulary {
		c.w.violate(fmt.Errorf("%s is quarantined, but all that was written can be read", c.wish.Stream))
	}
	if c.err == nil && c.receipt.Version > 0 {
		c.w.created[c.wish.Stream] = true
	}
	c.attempt, c.done, c.err, c.receipt = nil, false, nil, commands.Receipt{}
}

// dream makes up the next wish.
func (c *client) dream() {
	w := c.w
	was := c.wish
	c.tries = 0
	if was.Key != "" && w.rnd.IntN(5) == 0 {
		if w.rnd.IntN(3) == 0 { // another wish under the same key
			w.wishes++
			c.wish.Op = fmt.Sprint("w", w.wishes)
			c.wish.By++
		}
		return // or the same once more, though it has its answer
	}
	if other := w.clients[w.rnd.IntN(len(w.clients))]; other.busy() && other.wish.Key != "" && w.rnd.IntN(2) == 0 {
		c.wish = other.wish // two ask the same at the same time
		return
	}
	w.wishes++
	a := journaltest.Ask{Op: fmt.Sprint("w", w.wishes), Stream: w.streams[w.rnd.IntN(len(w.streams))], IfMatch: commands.AnyVersion}
	switch n := w.rnd.IntN(20); {
	case n < 10:
		a.What, a.By, a.Limit = journaltest.Add, 1+w.rnd.IntN(3), 1<<20
		if w.rnd.IntN(3) == 0 {
			a.Limit = 4 + w.rnd.IntN(12)
		}
		if w.rnd.IntN(3) == 0 {
			a.By = -a.By
		}
		if w.rnd.IntN(6) == 0 {
			a.Parts = 2 + w.rnd.IntN(2)
		}
	case n < 13:
		a.What, a.By = journaltest.Raise, 1+w.rnd.IntN(20)
	case n < 19:
		a.What = journaltest.Look
	default:
		a.What = journaltest.Finish
		if w.rnd.IntN(3) > 0 {
			a.What = journaltest.Look
		}
	}
	if a.What != journaltest.Look && w.rnd.IntN(2) == 0 {
		a.Key = "k" + a.Op
	}
	if w.rnd.IntN(6) == 0 {
		a.IfMatch = []int64{0, commands.Existing, int64(w.rnd.IntN(6)), w.head(a.Stream).Version}[w.rnd.IntN(4)]
	}
	c.wish = a
}

// source is one partition of another service's public topic, which our policies listen to.
type source struct {
	w         *world
	number    int
	topic     string
	partition int32
	group     string
	events    []sourceEvent
	committed int // by whoever owned it
	owners    []*owner
}

type sourceEvent struct {
	targets []string
	asks    map[string]journaltest.Ask
}

// owner is a consumer of the source: it hands its events out in order per target, and goes on doing that when it has
// lost the source without knowing it.
type owner struct {
	s       *source
	at      *replica
	next    int
	lanes   []*policyLane
	open    []int // targets of each event without an answer, from `first`
	first   int
	retired bool // it has lost the source
}

type policyLane struct {
	target      string
	queue       []int
	run         []int
	attempts    []*journaltest.Attempt
	quarantined bool

	mu      sync.Mutex
	done    bool
	handled int
	err     error
}

// happen adds an event to the source, about streams that exist.
func (s *source) happen() {
	w := s.w
	e := sourceEvent{asks: map[string]journaltest.Ask{}}
	for _, stream := range w.streams {
		if !w.created[stream] || w.rnd.IntN(2) == 0 {
			continue
		}
		w.wishes++
		e.targets = append(e.targets, stream)
		e.asks[stream] = journaltest.Ask{Op: fmt.Sprint("p", w.wishes), Stream: stream, What: journaltest.Must, By: 1, Limit: 1 << 20,
			IfMatch: commands.AnyVersion, Group: s.group,
			Cause: domain.Position{Topic: s.topic, Partition: s.partition, Seq: int64(len(s.events)) + 1}}
	}
	if len(e.targets) > 0 {
		s.events = append(s.events, e)
		w.say("%s/%d has event %d for %v", s.topic, s.partition, len(s.events), e.targets)
	}
}

// assign gives the source to the replica, which goes on where the last owner has committed.
func (s *source) assign(r *replica) {
	for _, o := range s.owners {
		o.retired = true
	}
	s.owners = append(s.owners, &owner{s: s, at: r, next: s.committed, first: s.committed})
	s.w.say("%s/%d goes to %s from %d", s.topic, s.partition, r.name, s.committed)
}

func (s *source) owner() *owner {
	if n := len(s.owners); n > 0 && !s.owners[n-1].retired {
		return s.owners[n-1]
	}
	return nil
}

// take puts the source's next event into the lanes of its targets.
func (o *owner) take() {
	e := o.s.events[o.next]
	for _, target := range e.targets {
		i := slices.IndexFunc(o.lanes, func(l *policyLane) bool { return l.target == target })
		if i < 0 {
			o.lanes = append(o.lanes, &policyLane{target: target})
			i = len(o.lanes) - 1
		}
		o.lanes[i].queue = append(o.lanes[i].queue, o.next)
	}
	o.open = append(o.open, len(e.targets))
	o.next++
}

// errBug is what a decision fails with, now and then, that is neither a refusal nor an outcome.
var errBug = fmt.Errorf("%w: a bug", commands.ErrNotReady)

// hand hands the first few events of the lane to the journal.
func (o *owner) hand(l *policyLane) {
	w := o.s.w
	l.run = l.queue[:1+w.rnd.IntN(min(len(l.queue), 4))]
	var cmds []commands.Command
	var decisions []commands.Decision[journaltest.Counter]
	l.attempts = nil
	for _, i := range l.run {
		a := o.s.events[i].asks[l.target]
		cmds, decisions = append(cmds, a.Command()), append(decisions, a.Decide)
		if w.faults["bugs"] && w.step < w.steps && w.rnd.IntN(6) == 0 {
			decisions[len(decisions)-1] = func(journaltest.Counter) ([]domain.Event, error) { return nil, errBug }
		}
		l.attempts = append(l.attempts, w.history.Call(100+o.s.number, a))
	}
	w.say("%s hands %s/%d %v to %s", o.at.name, o.s.topic, o.s.partition, l.run, l.target)
	o.at.wg.Go(func() {
		n, err := o.at.journal.HandleInOrder(o.at.ctx, cmds, decisions)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.done, l.handled, l.err = true, n, err
	})
}

// hear takes the journal's answer to a run, if it is there.
func (o *owner) hear(l *policyLane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.run == nil || !l.done {
		return
	}
	for i, a := range l.attempts {
		switch {
		case i < l.handled:
			a.Return(commands.Receipt{}, nil)
		case i == l.handled:
			a.Return(commands.Receipt{}, l.err)
		default: // it may have been in the same commit
			a.Return(commands.Receipt{}, commands.ErrUnknownOutcome)
		}
	}
	o.s.w.say("%s is told that %d of %d of %s/%d on %s are done: %v", o.at.name, l.handled, len(l.run), o.s.topic,
		o.s.partition, l.target, l.err)
	for _, i := range l.run[:l.handled] {
		o.open[i-o.first]--
	}
	l.queue = l.queue[l.handled:]
	l.quarantined = errors.Is(l.err, commands.ErrQuarantined)
	if l.quarantined && !o.s.w.poisoned[l.target] && !o.s.w.oldVocabulary {
		o.s.w.violate(fmt.Errorf("%s is quarantined, but all that was written can be read", l.target))
	}
	l.run, l.done = nil, false
	for len(o.open) > 0 && o.open[0] == 0 {
		o.open = o.open[1:]
		o.first++
	}
}

// finished says that all events are done, but those that wait for a stream which their owner cannot read.
func (s *source) finished() bool {
	o := s.owner()
	return s.committed == len(s.events) || o != nil && o.next == len(s.events) &&
		!slices.ContainsFunc(o.lanes, func(l *policyLane) bool { return len(l.queue) > 0 && !l.quarantined })
}

// choice is something that can happen next.
type choice struct {
	weight int
	do     func()
}

// choices is everything that can happen next. At the end, when all must come to rest, nothing goes wrong any more.
func (w *world) choices() (all []choice) {
	chaos := w.step < w.steps
	can := func(weight int, do func()) { all = append(all, choice{weight, do}) }
	fault := func(name string, weight int, do func()) {
		if chaos && w.faults[name] {
			can(weight, do)
		}
	}
	for slot, r := range w.replicas {
		switch {
		case r == nil:
			can(4, func() { w.start(slot) })
			continue
		case r.paused:
			if w.rnd.IntN(4) == 0 || !chaos {
				can(4, func() { r.paused = false; w.say("replica %s wakes up", r.name) })
			}
			continue
		}
		fault("crash", 1, func() { w.say("replica %s crashes", r.name); w.crash(r) })
		fault("pause", 1, func() { w.say("replica %s is paused", r.name); r.paused = true })
		fault("publishers", 1, func() {
			p := int32(w.rnd.IntN(simPartitions))
			w.say("replica %s publishes partition %d", r.name, p)
			r.publish(p)
		})
		if len(r.publishers) > 1 {
			fault("publishers", 1, func() {
				p := r.publishers[w.rnd.IntN(len(r.publishers))]
				w.say("a publisher of partition %d at %s ends", p.partition, r.name)
				p.stop()
				r.publishers = slices.DeleteFunc(r.publishers, func(q *publisher) bool { return q == p })
			})
		}
	}
	for _, q := range w.pending {
		if !q.replica.paused {
			w.answers(q, chaos, can, fault)
		}
	}
	for i, s := range w.strays {
		can(2, func() {
			w.strays = slices.Delete(w.strays, i, i+1)
			if chaos && w.rnd.IntN(4) == 0 {
				w.say("a copy of %s vanishes", s.order)
				return
			}
			w.say("a copy of %s lands", s.order)
			w.putPlain(s.topic, s.partition, s.records)
		})
	}
	up := slices.DeleteFunc(slices.Clone(w.replicas), func(r *replica) bool { return r == nil })
	for _, c := range w.clients {
		switch {
		case c.busy():
			fault("impatience", 1, func() { w.say("client %d hangs up", c.number); c.cancel() })
		case (chaos || c.again) && len(up) > 0:
			can(6, func() {
				if !c.again {
					c.dream()
				} else if chaos && w.rnd.IntN(12) == 0 {
					c.again = false // it gives up
					return
				}
				c.ask(up[w.rnd.IntN(len(up))])
			})
		}
	}
	for _, s := range w.sources {
		w.policies(s, chaos, up, can, fault)
	}
	if chaos {
		fault("garbage", 1, w.garbage)
		fault("poison", 1, w.poison)
		if !slices.ContainsFunc(w.journal.partitions, func(p simPartition) bool { return p.halting() >= 0 }) {
			fault("newer format", 1, w.newer)
		}
	}
	for p := range int32(simPartitions) {
		published := slices.ContainsFunc(up, func(r *replica) bool {
			return slices.ContainsFunc(r.publishers, func(q *publisher) bool { return q.partition == p })
		})
		if !published && len(up) > 0 {
			can(1, func() {
				r := up[w.rnd.IntN(len(up))]
				w.say("replica %s publishes partition %d", r.name, p)
				r.publish(p)
			})
		}
	}
	for p, part := range w.journal.partitions {
		if at := part.halting(); at >= 0 && (!chaos || w.rnd.IntN(8) == 0) {
			can(1, func() {
				w.say("an operator has %d/%d skipped", p, at)
				w.put(w.journal, int32(p), simRecord{Record: journal.NewSkipRecord(int32(p), at), bad: true, skip: at})
			})
		}
	}
	if w.faults["time"] || len(all) == 0 || !chaos {
		can(2, func() {
			d := time.Duration(1+w.rnd.IntN(1000)) * []time.Duration{10 * time.Microsecond, time.Millisecond}[w.rnd.IntN(2)]
			w.say("%s pass", d)
			time.Sleep(d)
		})
	}
	return all
}

// answers is what may become of a request.
func (w *world) answers(q *request, chaos bool, can func(int, func()), fault func(string, int, func())) {
	switch q.kind {
	case "read":
		if q.from < q.topic.partitions[q.partition].end {
			can(q.replica.read, func() {
				w.say("%s", q.order)
				w.deliver(q, !chaos)
				if strings.Contains(q.order, "fold") {
					synctest.Wait()
					w.print(q.replica, q.partition)
				}
			})
		}
	case "end":
		if !q.asked {
			can(4, func() {
				q.asked, q.end = true, q.topic.partitions[q.partition].end
				w.say("%s is %d", q.order, q.end)
				if w.rnd.IntN(2) == 0 {
					w.reply(q, answer{end: q.end})
				}
			})
			fault("end", 1, func() { w.say("%s fails", q.order); w.reply(q, answer{err: errAway}) })
			return
		}
		can(3, func() { w.say("%s arrives: %d", q.order, q.end); w.reply(q, answer{end: q.end}) })
	case "append", "publish":
		id := commitOf(q.records)
		if w.refused[id] {
			can(4, func() { w.say("%s is refused", q.order); w.reply(q, answer{err: journal.ErrRefused}) })
			return
		}
		can(4, func() { w.say("%s lands", q.order); w.landed(q, appendFault{lands: 1}) })
		fault("append", 3, func() {
			f := appendFaults[w.rnd.IntN(len(appendFaults))]
			w.say("%s is %s", q.order, f.name)
			w.landed(q, f)
		})
		if q.kind == "append" && q.records[0].Value != nil {
			fault("refused", 1, func() {
				w.say("%s is refused from now on", q.order)
				w.refused[id] = true
				w.reply(q, answer{err: journal.ErrRefused})
			})
		}
	}
}

func (w *world) policies(s *source, chaos bool, up []*replica, can func(int, func()), fault func(string, int, func())) {
	if chaos {
		can(1, s.happen)
	}
	s.owners = slices.DeleteFunc(s.owners, func(o *owner) bool { return w.replicas[o.at.slot] != o.at })
	if s.owner() == nil && len(up) > 0 {
		can(2, func() { s.assign(up[w.rnd.IntN(len(up))]) })
	} else if len(up) > 1 {
		fault("rebalance", 1, func() { s.assign(up[w.rnd.IntN(len(up))]) })
	}
	for _, o := range s.owners {
		if o.at.paused {
			continue
		}
		if !o.retired {
			if o.next < len(s.events) {
				can(2, o.take)
			}
			if s.committed < o.first {
				can(1, func() {
					s.committed = o.first
					w.say("%s commits %s/%d at %d", o.at.name, s.topic, s.partition, o.first)
				})
			}
		}
		for _, l := range o.lanes {
			if l.run == nil && len(l.queue) > 0 && (chaos || !l.quarantined) {
				can(2, func() { o.hand(l) })
			}
		}
	}
}

// halting is the first offset that halts the partition's readers, or -1.
func (p simPartition) halting() int64 {
	for _, r := range p.records {
		if r.tooNew && !slices.ContainsFunc(p.records, func(s simRecord) bool { return s.Offset > r.Offset && s.skip == r.Offset }) {
			return r.Offset
		}
	}
	return -1
}

// print compares what a replica has folded with what others had when they had folded as much.
func (w *world) print(r *replica, partition int32) {
	if w.oldVocabulary && r.slot == 0 {
		return
	}
	next, state := r.journal.Fingerprint(partition)
	key := fmt.Sprint(partition, " ", next)
	if was, ok := w.prints[key]; ok && was != state {
		w.violate(fmt.Errorf("two replicas that have read partition %d up to %d hold different states:\n%s\n%s", partition, next, was, state))
	}
	w.prints[key] = state
}

// run lets the world go its way until all is at rest. It returns a violation that shows on the way; check finds the others.
func (w *world) run() error {
	for slot := range w.replicas {
		w.start(slot)
	}
	limit := w.steps + 20_000
	for w.failed() == nil && !w.atRest() {
		if w.step > limit {
			w.violate(errors.New("it does not come to rest"))
			break
		}
		synctest.Wait()
		w.settle()
		for _, c := range w.clients {
			c.hear()
		}
		for _, s := range w.sources {
			for _, o := range s.owners {
				for _, l := range o.lanes {
					o.hear(l)
				}
			}
		}
		all := w.choices()
		total := 0
		for _, c := range all {
			total += c.weight
		}
		for n := w.rnd.IntN(total); ; all = all[1:] {
			if n -= all[0].weight; n < 0 {
				all[0].do()
				break
			}
		}
	}
	for _, r := range w.replicas {
		if r != nil {
			w.crash(r)
		}
	}
	for _, c := range w.clients {
		c.hear()
	}
	return w.failed()
}

// atRest says that everybody has an answer and everything that was accepted is public.
func (w *world) atRest() bool {
	if w.step < w.steps || slices.Contains(w.replicas, nil) || len(w.strays) > 0 {
		return false
	}
	if slices.ContainsFunc(w.clients, func(c *client) bool { return c.busy() || c.again }) ||
		slices.ContainsFunc(w.sources, func(s *source) bool { return !s.finished() }) {
		return false
	}
	for p := range int32(simPartitions) {
		if w.journal.partitions[p].halting() >= 0 || w.consumed(p) < w.accepted(p).events {
			return false
		}
		for _, r := range w.replicas {
			if next, _ := r.journal.Fingerprint(p); next < w.journal.partitions[p].end {
				return false
			}
		}
	}
	return true
}
