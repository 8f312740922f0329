package journaltest

import (
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
)

// Ask is a command to a counter that a history can judge: what it wants is data, and every event that it makes carries
// its name.
type Ask struct {
	Op     string // names the wish; attempts at the same wish share it
	Stream string
	What   What
	By     int // of Add, Raise and Must
	Limit  int // of Add and Must
	Parts  int // events that Add makes, default 1

	Key     string // Idempotency-Key, or empty
	IfMatch int64  // as of commands.Command

	Cause domain.Position // with a Group, the command is a policy's
	Group string
}

// What is what an Ask wants.
type What int

const (
	Add    What = iota // count By more, or less, unless that goes beyond Limit or below 1
	Raise              // count up to By, if it is not there yet
	Look               // nothing, of a counter that exists
	Finish             // close the counter
	Must               // of a policy: count By more on a counter that exists; beyond Limit, note that with an event
)

// String is the wish as a line of a trace.
func (a Ask) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s", a.Op, [...]string{"add", "raise", "look", "finish", "must"}[a.What], a.Stream)
	if a.What == Add || a.What == Raise || a.What == Must {
		fmt.Fprintf(&b, " %d", a.By)
	}
	if a.What == Add || a.What == Must {
		fmt.Fprintf(&b, " of %d", a.Limit)
	}
	if a.Parts > 1 {
		fmt.Fprintf(&b, " in %d", a.Parts)
	}
	if a.Key != "" {
		fmt.Fprintf(&b, " key=%s", a.Key)
	}
	if a.IfMatch != commands.AnyVersion {
		fmt.Fprintf(&b, " if-match=%d", a.IfMatch)
	}
	if a.Group != "" {
		fmt.Fprintf(&b, " cause=%s", a.Cause)
	}
	return b.String()
}

// Command is the command that the journal is given.
func (a Ask) Command() commands.Command {
	return commands.Command{Stream: a.Stream, Key: a.Key, Request: a.request(), IfMatch: a.IfMatch, Cause: a.Cause, Group: a.Group}
}

// request leaves the name of the wish out: a client that uses a key twice may ask the same.
func (a Ask) request() string { return fmt.Sprint(a.What, a.By, a.Limit, a.Parts, a.IfMatch) }

// Decide is the decision that the journal is given.
func (a Ask) Decide(c Counter) ([]domain.Event, error) {
	switch a.What {
	case Add:
		if c.Done || c.N+a.By > a.Limit || c.N+a.By < 1 {
			return nil, ErrFull
		}
		events := make([]domain.Event, max(a.Parts, 1))
		for i := range events {
			events[i] = Counted{Op: a.Op}
		}
		events[0] = Counted{a.By, a.Op}
		return events, nil
	case Raise:
		if c.N >= a.By || c.Done {
			return nil, nil
		}
		return []domain.Event{Counted{a.By - c.N, a.Op}}, nil
	case Finish:
		if c.N == 0 {
			return nil, domain.ErrUnknown
		}
		if c.Done {
			return nil, nil
		}
		return []domain.Event{Finished{a.Op}}, nil
	case Must:
		if c.N == 0 {
			return nil, domain.ErrUnknown
		}
		if c.Done {
			return nil, nil
		}
		if c.N+a.By > a.Limit {
			return []domain.Event{Counted{0, a.Op}}, nil
		}
		return []domain.Event{Counted{a.By, a.Op}}, nil
	}
	return Exist(c)
}

// History is what clients asked of counters and were told. It takes notes while a test runs, and says afterwards
// whether all answers were true: whether, for each stream, there is an order of the commands that agrees with every
// answer, with the time at which it was given, and with the public log. Porcupine looks for that order
// (github.com/anishathalye/porcupine, after Lowe's "Testing for linearizability"). A History assumes that a key's
// attempts come before the stream has forgotten it. The zero value is ready for use.
type History struct {
	// Clock tells the time of calls and answers: any number that grows. Nil means the monotonic clock.
	Clock func() int64

	mu       sync.Mutex
	began    time.Time
	attempts []*Attempt
}

// Attempt is one call of the journal.
type Attempt struct {
	Ask
	Client int // for people

	h            *History
	call, answer int64
	known        bool // answer is set
	receipt      commands.Receipt
	err          error
}

func (h *History) now() int64 {
	if h.Clock != nil {
		return h.Clock()
	}
	if h.began.IsZero() {
		h.began = time.Now()
	}
	return int64(time.Since(h.began))
}

// Call notes that a client asks. It must be called before the journal is.
func (h *History) Call(client int, a Ask) *Attempt {
	h.mu.Lock()
	defer h.mu.Unlock()
	at := &Attempt{Ask: a, Client: client, h: h, call: h.now(), answer: math.MaxInt64}
	h.attempts = append(h.attempts, at)
	return at
}

// Return notes what Handle returned. An attempt that is never returned is one whose outcome nobody was told.
func (a *Attempt) Return(r commands.Receipt, err error) {
	a.h.mu.Lock()
	defer a.h.mu.Unlock()
	a.receipt, a.err, a.known, a.answer = r, err, true, a.h.now()
}

// Attempts is all that was asked so far.
func (h *History) Attempts() []*Attempt {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.attempts)
}

// Interval is when the attempt was called and answered; math.MaxInt64 for one that was not answered.
func (a *Attempt) Interval() (call, answer int64) { return a.call, a.answer }

// Done says that the client was told that its wish is fulfilled.
func (a *Attempt) Done() bool { return a.known && a.err == nil }

// open says that the attempt may have had an effect, or may yet have one.
func (a *Attempt) open() bool { return !a.known || errors.Is(a.err, commands.ErrUnknownOutcome) }

// nothing says that the client was told that the attempt did nothing, without a word about the state.
func (a *Attempt) nothing() bool {
	return errors.Is(a.err, commands.ErrConflict) || errors.Is(a.err, commands.ErrNotReady) ||
		errors.Is(a.err, commands.ErrTooLarge) || errors.Is(a.err, commands.ErrQuarantined)
}

func (a *Attempt) String() string {
	answer := "open"
	switch {
	case a.known && a.err != nil:
		answer = "error: " + a.err.Error()
	case a.known:
		answer = fmt.Sprintf("version %d at %s", a.receipt.Version, a.receipt.Position)
	}
	end := "…"
	if a.known {
		end = fmt.Sprint(a.answer)
	}
	return fmt.Sprintf("%6d–%-6s client %d: %s ─▶ %s", a.call, end, a.Client, a.Ask, answer)
}

// Effect is what a wish left in the public log.
type Effect struct {
	Version int64 // of the stream after it
	Events  int
	Last    domain.Recorded
}

// Effects finds the effect of every wish in the public log: the events of each partition in order. It is an error
// when one has two, or one that is torn.
func Effects(published []domain.Recorded) (map[string]Effect, error) {
	effects := map[string]Effect{}
	for _, e := range published {
		op := opOf(e)
		if op == "" {
			continue
		}
		was, again := effects[op]
		if again && (was.Last.Stream != e.Stream || was.Last.Offset != e.Offset || was.Last.Index+1 != e.Index) {
			return nil, fmt.Errorf("%s was done twice: as version %d of %s, and as version %d of %s", op,
				was.Version, was.Last.Stream, e.Version, e.Stream)
		}
		effects[op] = Effect{e.Version, was.Events + 1, e}
	}
	return effects, nil
}

func opOf(e domain.Recorded) string {
	if decoded, err := Events.Decode(e.Name, e.Data); err == nil {
		switch decoded := decoded.(type) {
		case Counted:
			return decoded.Op
		case Finished:
			return decoded.Op
		}
	}
	return ""
}

// Check says what is wrong with the answers, given the public log at rest: the events of each partition in order,
// as the consumer rule lets them through. Events without the name of a wish are taken for those of other writers.
func (h *History) Check(published []domain.Recorded) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	effects, err := Effects(published)
	if err != nil {
		return err
	}
	seqs := map[string]map[int64]int64{} // stream, version: seq
	partitions := map[string]int32{}
	streams := map[string][]porcupine.Operation{}
	for _, e := range published {
		if seqs[e.Stream] == nil {
			seqs[e.Stream] = map[int64]int64{}
		}
		if seqs[e.Stream][e.Version] != 0 || e.Version > 1 && seqs[e.Stream][e.Version-1] == 0 {
			return fmt.Errorf("%s has its version %d twice, or before the one below it", e.Stream, e.Version)
		}
		seqs[e.Stream][e.Version], partitions[e.Stream] = e.Seq, e.Partition
		if opOf(e) == "" {
			streams[e.Stream] = append(streams[e.Stream], porcupine.Operation{
				Input: foreign{e}, Call: math.MinInt64, Return: math.MaxInt64, Output: output{open: true}})
		}
	}
	first, firstDone := map[string]int64{}, map[string]int64{} // by wish: the first call, and the first time it was called done
	settled := map[string]int64{}                              // by key: its last certain answer
	for _, a := range h.attempts {
		if _, ok := first[a.Op]; !ok && !a.nothing() {
			first[a.Op] = a.call
		}
		if end, ok := firstDone[a.Op]; a.Done() && (!ok || a.answer < end) {
			firstDone[a.Op] = a.answer
		}
		if !a.open() && !a.nothing() {
			settled[a.Key] = max(settled[a.Key], a.answer)
		}
	}
	explained, merged := map[string]bool{}, map[string]bool{}
	for _, a := range h.attempts {
		if a.nothing() {
			continue
		}
		o := output{open: a.open(), effect: effects[a.Op], version: a.receipt.Version, code: codeOf(a.err)}
		if o.code == unexpected {
			return fmt.Errorf("an answer that no client should get: %s", a)
		}
		if a.Done() && a.Group == "" && (seqs[a.Stream][a.receipt.Version] > a.receipt.Position.Seq ||
			a.receipt.Version > 0 && partitions[a.Stream] != a.receipt.Position.Partition) {
			return fmt.Errorf("the position that was told does not hold the version that was told: %s", a)
		}
		op := porcupine.Operation{ClientId: a.Client, Input: a.Ask, Call: a.call, Return: a.answer}
		if o.effect.Version > 0 && !explained[a.Op] {
			// The wish is in the log, so one of its attempts did it. Which one is not known; it does not matter.
			did := op
			did.Call, did.Return, did.Output = first[a.Op], math.MaxInt64, output{did: true, effect: o.effect}
			if end, ok := firstDone[a.Op]; ok {
				did.Return = end
			}
			streams[a.Stream] = append(streams[a.Stream], did)
		}
		switch {
		case o.effect.Version > 0 && a.Done():
			explained[a.Op] = true
			if a.Group == "" && a.receipt.Version != o.effect.Version {
				return fmt.Errorf("it is version %d that was made by %s", o.effect.Version, a)
			}
			continue
		case o.open && (o.effect.Version > 0 || a.Key == "" || settled[a.Key] <= a.call || merged[a.Op]):
			// What it did is in the log, or nobody saw it, or an earlier attempt at the wish stands for it too.
			explained[a.Op] = true
			continue
		case o.open:
			merged[a.Op] = true
			op.Return = settled[a.Key] // after which it makes no difference
		}
		explained[a.Op] = true
		// On a stream that does not exist no key is written down, but two requests under one key at the same time are
		// noticed all the same.
		o.twoRequests = slices.ContainsFunc(h.attempts, func(other *Attempt) bool {
			return o.code == "reused" && other.Key == a.Key && other.Stream == a.Stream && other.request() != a.request() &&
				other.call < a.answer && a.call < other.answer
		})
		op.Output = o
		streams[a.Stream] = append(streams[a.Stream], op)
	}
	for op, effect := range effects {
		if !explained[op] {
			return fmt.Errorf("%s has version %d by %s, which is said to have done nothing%s", effect.Last.Stream,
				effect.Version, op, h.trace(effect.Last.Stream, effects))
		}
	}
	for name, ops := range streams {
		switch porcupine.CheckOperationsTimeout(model, ops, judging) {
		case porcupine.Illegal:
			return fmt.Errorf("the answers about %s cannot all be true%s", name, h.trace(name, effects))
		case porcupine.Unknown:
			return fmt.Errorf("the %d answers about %s are too many to judge", len(ops), name)
		}
	}
	return nil
}

const (
	judging = 20 * time.Second // the longest that the answers about one stream may take
	traced  = 60               // lines
)

func (h *History) trace(stream string, effects map[string]Effect) string {
	var lines []string
	for _, a := range h.attempts {
		if a.Stream == stream {
			line := a.String()
			if e := effects[a.Op]; e.Version > 0 {
				line += fmt.Sprintf(" (version %d, journal offset %d)", e.Version, e.Last.Offset)
			}
			lines = append(lines, line)
		}
	}
	if n := len(lines) - traced; n > 0 {
		lines = append([]string{fmt.Sprint(n, " earlier ones, then")}, lines[n:]...)
	}
	return ":\n\t" + strings.Join(lines, "\n\t")
}

// output is what an attempt is known to have led to.
type output struct {
	open        bool // nobody knows, and nothing is in the log
	did         bool // its events are in the log, whoever was told what
	version     int64
	code        string
	effect      Effect
	twoRequests bool // under its key, at the same time
}

// foreign is an event that another writer put into the log.
type foreign struct{ domain.Recorded }

const unexpected = "?"

// codeOf is the answer without its words.
func codeOf(err error) string {
	var refusal *domain.Refusal
	switch {
	case err == nil, errors.Is(err, commands.ErrUnknownOutcome):
		return ""
	case errors.Is(err, commands.ErrPrecondition):
		return "precondition"
	case errors.Is(err, commands.ErrKeyReused):
		return "reused"
	case errors.As(err, &refusal):
		return refusal.Code
	}
	return unexpected
}

// belief is what is true of a stream at one moment of the order that is looked for.
type belief struct {
	version int64
	counter Counter
	broken  bool
	keys    *told // newest first
	keysSum uint64
	causes  []heard // replaced, never changed
}

type told struct {
	key, request, code string
	version            int64
	before             *told
}

type heard struct {
	group, topic string
	partition    int32
	seq          int64
}

var model = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{belief{}} },
	Step: func(state, input, out any) []any {
		b, o := state.(belief), out.(output)
		if e, ok := input.(foreign); ok {
			return b.foreign(e)
		}
		return b.step(input.(Ask), o)
	},
	Hash: func(state any) uint64 { return uint64(state.(belief).version)<<32 ^ state.(belief).keysSum },
	Equal: func(a, b any) bool {
		x, y := a.(belief), b.(belief)
		return x.version == y.version && x.counter == y.counter && x.broken == y.broken && x.keysSum == y.keysSum &&
			slices.Equal(x.causes, y.causes)
	},
}).ToModel()

func (b belief) foreign(e foreign) []any {
	if e.Version != b.version+1 {
		return nil
	}
	b.version++
	event, err := Events.Decode(e.Name, e.Data)
	if err != nil {
		b.broken = true
	} else if !b.broken {
		b.counter = b.counter.Evolve(event)
	}
	return []any{b}
}

// step is every belief that the attempt may leave behind, given what it led to: the specification of the journal.
func (b belief) step(a Ask, o output) []any {
	next, version, code, events := b.decide(a)
	possible := !b.broken && (events == 0 || next.version == o.effect.Version && events == o.effect.Events)
	answers := code == o.code && (code != "" || version == o.version) || a.Group != ""
	switch {
	case o.code == "reused" && o.twoRequests && b.version == 0:
		return []any{b}
	case o.did && possible && events > 0:
		return []any{next}
	case o.did:
		return nil
	case o.open && possible:
		return []any{b, next}
	case o.open:
		return []any{b}
	case possible && answers:
		return []any{next}
	}
	return nil
}

// decide is what the command leads to on this belief, and what its client is to be told.
func (b belief) decide(a Ask) (next belief, version int64, code string, events int) {
	if a.Group != "" {
		for _, h := range b.causes {
			if h.group == a.Group && h.topic == a.Cause.Topic && h.partition == a.Cause.Partition && a.Cause.Seq <= h.seq {
				return b, b.version, "", 0
			}
		}
	}
	for t := b.keys; t != nil && a.Key != ""; t = t.before {
		if t.key == a.Key {
			if t.request != a.request() {
				return b, 0, "reused", 0
			}
			return b, t.version, t.code, 0
		}
	}
	next = b
	if a.IfMatch >= 0 && b.version > 0 && b.version != a.IfMatch {
		code = "precondition"
	} else {
		made, err := a.Decide(b.counter)
		code = codeOf(err)
		if code == "" && a.IfMatch > 0 && b.version == 0 || code == "" && a.IfMatch == commands.Existing && b.version == 0 {
			made, code = nil, "precondition"
		}
		for _, e := range made {
			next.counter = next.counter.Evolve(e)
		}
		events = len(made)
		next.version += int64(events)
	}
	if a.Group != "" && events > 0 {
		next.causes = slices.DeleteFunc(slices.Clone(b.causes), func(h heard) bool {
			return h.group == a.Group && h.topic == a.Cause.Topic && h.partition == a.Cause.Partition
		})
		next.causes = append(next.causes, heard{a.Group, a.Cause.Topic, a.Cause.Partition, a.Cause.Seq})
	}
	if a.Key != "" && next.version > 0 {
		next.keys = &told{a.Key, a.request(), code, next.version, b.keys}
		sum := fnv.New64a()
		fmt.Fprint(sum, a.Key, a.request(), code, next.version)
		next.keysSum = b.keysSum + sum.Sum64()
	}
	return next, next.version, code, events
}

// Consume lets the records of each partition of a public topic through the consumer rule: partition by partition, in
// order. A gap is an error.
func Consume(partitions ...[]journal.Record) ([]domain.Recorded, error) {
	var all []domain.Recorded
	for _, records := range partitions {
		last := int64(0)
		for _, r := range records {
			e, ok := journal.ParseEvent("counters.events", r)
			if !ok {
				continue
			}
			process, err := journal.Next(last, e)
			if err != nil {
				return nil, err
			}
			if process {
				last = e.Seq
				all = append(all, e)
			}
		}
	}
	return all, nil
}
