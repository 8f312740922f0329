package journal

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	"github.com/google/uuid"

	"wharf/commands"
	"wharf/domain"
)

// call is one Handle in progress. Its stream's lane holds it, in the queue or in the flight, until it is answered or
// its caller leaves.
type call[S commands.State[S]] struct {
	commands.Command
	decide       commands.Decision[S]
	key, request digest
	reply        reply
	run          *run[S]

	attempts int  // proposals that lost
	flying   bool // in a commit that was sent and is not resolved
	joined   bool // a barrier
	proven   bool // a barrier has passed: the state is younger than the call
	answered bool
}

type reply struct {
	receipt commands.Receipt
	err     error
}

// run is the calls that were made together, in order. Once one has failed without a certain outcome, those behind it
// must not be decided: the stream would take the one that failed for a repetition when it comes again.
type run[S commands.State[S]] struct {
	calls  []call[S]
	open   int           // calls without an answer
	failed *call[S]      // the first that has failed
	done   chan struct{} // closed when all have one
}

var errBehind = fmt.Errorf("%w: an earlier event of the same source has not been handled", commands.ErrNotReady)

func isRefusal(err error) bool {
	var r *domain.Refusal
	return errors.As(err, &r)
}

// answer gives the call its answer, unless it has one.
func (c *call[S]) answer(receipt commands.Receipt, err error) {
	if c.answered {
		return
	}
	c.answered, c.reply = true, reply{receipt, err}
	if err != nil && !isRefusal(err) {
		c.fail()
	}
	if c.run.open--; c.run.open == 0 {
		close(c.run.done)
	}
}

// lane is a stream's commands: those that wait, and those whose commit is on its way. There is never more than one
// commit on its way, so the queue is decided as one group on the state after it.
type lane[S commands.State[S]] struct {
	queue  []*call[S] // in order of arrival
	flight *flight[S]
	pause  *time.Timer // while the stream is left to other replicas
	// patience is when the pauses end at the latest; zero when the last commit was ours.
	patience  time.Time
	contended int // losses since then
}

// flight is a commit that was proposed and whose fate is open.
type flight[S commands.State[S]] struct {
	commit   Commit
	fence    uuid.UUID // the commit that was proposed in its place, after the log refused it
	record   Record
	sent     time.Time
	members  []member[S]
	resolved chan struct{}
}

// member is a call in a flight, and what it is answered if the commit is accepted.
type member[S commands.State[S]] struct {
	*call[S]
	version int64
	own     int // events of the call
	events  int // of the commit, up to and including the call's
	note    int
	err     error
}

// handle queues the commands, which are to one stream, and waits for their answers, which are in the run.
func (p *partition[S]) handle(ctx context.Context, cs []commands.Command, ds []commands.Decision[S]) (*run[S], error) {
	r := &run[S]{calls: make([]call[S], len(cs)), open: len(cs), done: make(chan struct{})}
	for i, c := range cs {
		r.calls[i] = call[S]{Command: c, decide: ds[i], run: r}
		if c.Key != "" {
			r.calls[i].key, r.calls[i].request = digestOf(c.Key), digestOf(c.Request)
		}
	}
	stream := cs[0].Stream
	p.mu.Lock()
	if err := p.admit(); err != nil {
		p.mu.Unlock()
		return nil, err
	}
	p.calls++
	l := p.lanes[stream]
	if l == nil {
		l = &lane[S]{}
		p.lanes[stream] = l
	}
	for i := range r.calls {
		l.queue = append(l.queue, &r.calls[i])
	}
	p.turn(stream)
	p.mu.Unlock()

	select {
	case <-r.done:
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls--
	if r.open > 0 {
		// Out of time. What is unanswered now is never decided again by this replica.
		for i := range r.calls {
			c := &r.calls[i]
			if c.flying {
				c.answer(commands.Receipt{}, commands.ErrUnknownOutcome)
			} else {
				c.answer(commands.Receipt{}, fmt.Errorf("%w: no outcome in time, and nothing was appended", commands.ErrNotReady))
			}
		}
		if l := p.lanes[stream]; l != nil {
			l.queue = slices.DeleteFunc(l.queue, func(c *call[S]) bool { return c.run == r })
			p.turn(stream)
		}
	}
	return r, nil
}

// fail keeps the calls behind this one from being decided.
func (c *call[S]) fail() {
	if c.run.failed == nil {
		c.run.failed = c
	}
}

// admit says whether one more call may wait.
func (p *partition[S]) admit() error {
	switch {
	case p.halted != nil:
		return fmt.Errorf("%w: %w", commands.ErrNotReady, p.halted)
	case p.life.Err() != nil:
		return fmt.Errorf("%w: shutting down", commands.ErrNotReady)
	case p.calls >= p.MaxCalls:
		return fmt.Errorf("%w: %d commands are waiting already", commands.ErrNotReady, p.calls)
	}
	return nil
}

// failAll answers everything that waits in a queue. What is on its way stays open.
func (p *partition[S]) failAll(err error) {
	for name, l := range p.lanes {
		for _, c := range l.queue {
			c.answer(commands.Receipt{}, err)
		}
		l.queue = nil
		p.tidy(name, l)
	}
}

func (p *partition[S]) tidy(name string, l *lane[S]) {
	if len(l.queue) == 0 && l.flight == nil && l.pause == nil {
		delete(p.lanes, name)
	}
}

// turn decides everything that waits in the stream's queue, in order, on one draft of the state, and sends the
// events as one commit. It does nothing while a commit is on its way.
func (p *partition[S]) turn(name string) {
	l := p.lanes[name]
	if l == nil || l.flight != nil || l.pause != nil || !p.ready || p.halted != nil {
		return
	}
	g := p.newGroup(name)
	for len(l.queue) > 0 {
		c := l.queue[0]
		if !c.answered && !g.decide(c) {
			break // the commit is full; the rest is decided after it
		}
		l.queue = l.queue[1:]
	}
	if g.frame.events == nil && g.frame.outcomes == nil {
		// Nothing happened: true only if the state was current.
		for _, m := range g.members {
			if m.proven {
				m.answer(g.receipt(m, g.stream.seq), m.err)
			} else {
				l.queue = append(l.queue, m.call)
				p.join(m.call)
			}
		}
		p.tidy(name, l)
		return
	}
	l.flight = p.propose(g)
	go p.send(name, l.flight)
}

// group is a commit in the making: a draft of the stream, and the calls decided on it so far.
type group[S commands.State[S]] struct {
	*partition[S]
	name    string
	stream  *stream[S] // as folded; nothing but answers is taken from it
	draft   stream[S]
	heard   bool           // the draft has causes of its own
	keys    map[digest]int // of the members
	frame   frame
	bytes   int
	members []member[S]
	trace   string
}

func (p *partition[S]) newGroup(name string) *group[S] {
	s := p.streams.byName[name]
	if s == nil {
		s = &stream[S]{}
	}
	return &group[S]{partition: p, name: name, stream: s, draft: *s}
}

func (g *group[S]) receipt(m member[S], seq int64) commands.Receipt {
	return commands.Receipt{Stream: g.name, Version: m.version, Position: g.position(seq), Note: m.note}
}

// decide decides one call on the draft. It answers at once what the folded state proves (a repetition), and adds a
// member for everything else. It is false when the commit has no room for the call.
func (g *group[S]) decide(c *call[S]) bool {
	if f := c.run.failed; f != nil && f != c {
		c.answer(commands.Receipt{}, errBehind)
		return true
	}
	if g.stream.quarantined() {
		c.answer(commands.Receipt{}, commands.ErrQuarantined) // for good, as far as this program can tell
		return true
	}
	if c.Group != "" && g.stream.heard(c.Group, c.Cause) {
		c.answer(commands.Receipt{Stream: g.name, Version: g.stream.Version, Position: g.position(g.stream.seq)}, nil)
		return true
	}
	if a := g.stream.answered(c.key); c.Key != "" && a != nil {
		g.repeat(c, a)
		return true
	}
	m := member[S]{call: c, version: g.draft.Version, events: len(g.frame.events)}
	if g.repeats(&m) {
		return true
	}
	events, err := g.ask(c)
	if len(events) > MaxEvents {
		events, err = nil, commands.ErrTooLarge
	}
	encoded := make([]frameEvent, len(events))
	size := 0
	for i, e := range events {
		data, bad := domain.Encode(e)
		if bad != nil {
			encoded, events, err = nil, nil, bad
			break
		}
		// Postgres and JSON readers have microseconds: a time that is finer would change on its way.
		encoded[i] = frameEvent{g.NewID(), e.EventName(), g.Now().UTC().Truncate(time.Microsecond), data, c.Cause, c.Group}
		size += len(data) + len(e.EventName()) + 128
	}
	if err != nil && !isRefusal(err) {
		c.fail()
	}
	if c.Key != "" {
		size += 64
		if r, ok := refusalOf(err); ok {
			size += len(r.Code) + len(r.Detail)
		}
	}
	n := len(g.frame.events)
	if n+len(g.frame.outcomes) > 0 && (n+len(events) > MaxEvents || g.bytes+size > maxGroupBytes) {
		return false
	}
	g.bytes += size
	g.frame.events = append(g.frame.events, encoded...)
	for _, e := range events {
		g.draft.state = g.draft.state.Evolve(e)
	}
	g.draft.Version += int64(len(events))
	if c.Group != "" && len(events) > 0 {
		if !g.heard {
			g.draft.memory, g.heard = g.draft.memory.forDraft(), true
		}
		g.draft.hear(c.Group, c.Cause)
	}
	m.version, m.own, m.events, m.err = g.draft.Version, len(events), len(g.frame.events), err
	if c.Note != nil {
		m.note = *c.Note
	}
	if c.Key != "" && g.draft.exists() {
		// A keyed answer is written down before it is given, a refusal too: a retry must get the same one.
		refusal, ok := refusalOf(err)
		if err == nil || ok {
			g.frame.outcomes = append(g.frame.outcomes, outcome{c.key, c.request, m.events, m.note, refusal})
		}
	}
	if c.Key != "" {
		if g.keys == nil {
			g.keys = map[digest]int{}
		}
		g.keys[c.key] = len(g.members)
	}
	if g.trace == "" && len(events) > 0 {
		g.trace = c.Trace
	}
	g.members = append(g.members, m)
	return true
}

// repeats finds a repetition within the group; it shares the fate and the answer of the first.
func (g *group[S]) repeats(m *member[S]) bool {
	if m.Group != "" && g.draft.heard(m.Group, m.Cause) {
		g.members = append(g.members, *m)
		return true
	}
	i, found := g.keys[m.key]
	if m.Key == "" || !found {
		return false
	}
	first := g.members[i]
	if first.request == m.request {
		m.version, m.events, m.note, m.err = first.version, first.events, first.note, first.err
	} else {
		m.err = commands.ErrKeyReused
	}
	g.members = append(g.members, *m)
	return true
}

func (g *group[S]) ask(c *call[S]) (events []domain.Event, err error) {
	defer func() {
		if bug := recover(); bug != nil { // which must not leave the partition locked
			events, err = nil, fmt.Errorf("the decision panicked: %v\n%s", bug, debug.Stack())
		}
	}()
	if c.IfMatch >= 0 && g.draft.exists() && g.draft.Version != c.IfMatch {
		return nil, commands.ErrPrecondition
	}
	events, err = c.decide(g.draft.state)
	if err != nil {
		return nil, err
	}
	if c.IfMatch != commands.AnyVersion && c.IfMatch != 0 && !g.draft.exists() {
		return nil, commands.ErrPrecondition // only now: a command that finds nothing says so itself
	}
	return events, nil
}

// The codes of the journal's own refusals, where they are written down for a key.
const codePrecondition = "precondition-failed"

func refusalOf(err error) (*domain.Refusal, bool) {
	if errors.Is(err, commands.ErrPrecondition) {
		return domain.Refuse(codePrecondition, ""), true
	}
	var r *domain.Refusal
	ok := errors.As(err, &r)
	return r, ok
}

func refusalError(r *domain.Refusal) error {
	if r.Code == codePrecondition {
		return commands.ErrPrecondition
	}
	return r
}

// propose makes the group a flight.
func (p *partition[S]) propose(g *group[S]) *flight[S] {
	f := &flight[S]{
		commit:   Commit{ID: p.NewID(), Parent: g.stream.Head, Events: len(g.frame.events)},
		sent:     time.Now(),
		members:  g.members,
		resolved: make(chan struct{}),
	}
	for _, m := range f.members {
		m.flying = true
	}
	f.record = newCommitRecord(g.name, p.Partitions, f.commit, g.trace, g.frame.encode())
	return f
}

// send hands the flight's record to the log until the fold has seen what became of it. An error of the log is no
// outcome: the record may be in it all the same, so the same one is sent again. Only when the log refuses it for good
// is it given up, and then by proposing a fence on the same parent: whichever of the two the log has first, counts.
func (p *partition[S]) send(name string, f *flight[S]) {
	record := f.record
	for delay := resendDelay; ; {
		err := p.Log.Append(p.life, record)
		switch {
		case err == nil || p.life.Err() != nil:
			return
		case errors.Is(err, ErrRefused) && f.fence == uuid.Nil:
			p.Logger.Error("the log refuses a commit", "partition", p.number, "stream", name, "err", err)
			fence := Commit{ID: p.NewID(), Parent: f.commit.Parent}
			record = newCommitRecord(name, p.Partitions, fence, "", nil)
			p.mu.Lock()
			f.fence = fence.ID
			p.mu.Unlock()
		default:
			p.complain(name, err)
			select {
			case <-time.After(delay):
			case <-f.resolved:
				return
			case <-p.life.Done():
				return
			}
			delay = min(2*delay, time.Second)
		}
	}
}

// complain says that the log is out of reach: once a second, not once a stream.
func (p *partition[S]) complain(name string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.complained) < time.Second {
		return
	}
	p.complained = time.Now()
	p.Logger.Warn("cannot append a commit, trying again", "partition", p.number, "stream", name, "err", err)
}

// repeat gives the call the answer that its key was given before.
func (p *partition[S]) repeat(c *call[S], a *answer) {
	receipt := commands.Receipt{Stream: c.Stream, Version: a.version, Position: p.position(a.seq)}
	switch {
	case a.request != c.request.short():
		c.answer(commands.Receipt{}, commands.ErrKeyReused)
	case a.rest == nil:
		c.answer(receipt, nil)
	case a.rest.refusal != nil:
		c.answer(commands.Receipt{}, refusalError(a.rest.refusal))
	default:
		receipt.Note = a.rest.note
		c.answer(receipt, nil)
	}
}

// tell answers the calls that wait with a key of the commit: the stream may have forgotten it when their turn comes.
func (p *partition[S]) tell(name string, c Commit, told []answer) {
	l := p.lanes[name]
	if l == nil || len(told) == 0 {
		return
	}
	byKey := make(map[digest]*answer, len(told))
	for i := range told {
		byKey[told[i].key] = &told[i]
	}
	waiting := l.queue
	if l.flight != nil && l.flight.commit.ID != c.ID {
		waiting = slices.Clone(l.queue)
		for _, m := range l.flight.members {
			waiting = append(waiting, m.call)
		}
	}
	for _, w := range waiting {
		if a := byKey[w.key]; a != nil && w.Key != "" {
			p.repeat(w, a)
		}
	}
}

// resolve tells the stream's flight that the commit was accepted. `before` is the partition's count before it.
func (p *partition[S]) resolve(name string, c Commit, before int64) {
	l := p.lanes[name]
	if l == nil {
		return
	}
	f := l.flight
	if f == nil {
		p.lost(name, l)
		return
	}
	// Any commit that is accepted was on the flight's parent, so it decides the flight.
	l.flight = nil
	close(f.resolved)
	var lost []*call[S]
	for _, m := range f.members {
		m.flying = false
		switch {
		case c.ID == f.commit.ID:
			m.answer(commands.Receipt{Stream: name, Version: m.version, Position: p.position(before + int64(m.events)),
				Note: m.note}, m.err)
		case m.answered: // its caller has left: never decided again
		case c.ID == f.fence && m.own > 0:
			m.answer(commands.Receipt{}, commands.ErrTooLarge)
		default:
			if m.attempts++; m.attempts >= maxAttempts {
				m.answer(commands.Receipt{}, commands.ErrConflict)
			} else {
				lost = append(lost, m.call)
			}
		}
	}
	l.queue = append(lost, l.queue...)
	p.measure(time.Since(f.sent))
	if c.ID == f.commit.ID || c.ID == f.fence {
		p.won(name, l)
	} else {
		p.lost(name, l)
	}
	p.turn(name)
	p.tidy(name, l)
}
