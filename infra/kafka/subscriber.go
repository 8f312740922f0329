package kafka

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"wharf/infra/journal"
)

// SubscriberConfig says how a Subscriber hands out records. Only Group is required.
type SubscriberConfig struct {
	Group string // the consumer group

	// Targets is what a record is for. It is handed out once for each target, as a message of its own (see TargetOf):
	// the messages for one target of a source partition one at a time, in order; those for different targets at the
	// same time. A record without targets is done at once. An error halts the source partition: whatever comes later might
	// be for the same target, and overtake. Nil means one target for all: a total order per partition.
	Targets func(*message.Message) ([]string, error)

	// Admit is asked for every record of a source partition, in order, with what it returned for the record before
	// (0 at the start of the log): whether to process the record, and its value to go on with, which is committed
	// together with the offset. An error halts the source partition. Nil admits everything.
	Admit func(topic string, r journal.Record, last int64) (next int64, process bool, err error)

	// Owned is run for every partition number that this member holds of all the topics, until ctx ends. caughtUp
	// returns nil once all that was in these partitions when it was called is done; it does not return before ctx
	// ends while a message is nacked again and again, or a partition is halted.
	Owned func(ctx context.Context, partition int32, caughtUp func(context.Context) error)

	// Batch is how many records for one target may come as one message, if so many wait: see RecordsOf. They are acked
	// and nacked together. Default 1.
	Batch int

	Window             int           // records of a partition that may wait for their acks; default 4096
	Concurrency        int           // messages handed out and not answered, per subscription; default 256
	RedeliveryDelay    time.Duration // before a nacked message comes again, doubling; default 100 ms
	RedeliveryDelayMax time.Duration // default 3 s
	DrainTimeout       time.Duration // for messages that are out when partitions are given up; default 5 s, below 10 s
}

const (
	windowBytes    = 4 << 20     // bounds the window of a partition with large records
	commitInterval = time.Second // between commits of what is done
	stuckAfter     = 8           // redeliveries until a target is called stuck
	stuckInterval  = time.Minute // between two warnings of one stuck target
	progressPrefix = "wharf:"    // of the metadata of a committed offset
)

// Subscriber is Watermill's message.Subscriber for policies, see SubscriberConfig. It commits the offsets of records
// that are done without a gap, once a second and when partitions are given up, so each record is handed out at
// least once.
type Subscriber struct {
	c      *Client
	cfg    SubscriberConfig
	ctx    context.Context
	cancel context.CancelFunc

	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup
	halted map[string]error // by source partition
}

// NewSubscriber returns a Subscriber that has to be closed before the Client.
func NewSubscriber(c *Client, cfg SubscriberConfig) *Subscriber {
	if cfg.Targets == nil {
		cfg.Targets = func(*message.Message) ([]string, error) { return []string{""}, nil }
	}
	if cfg.Admit == nil {
		cfg.Admit = func(_ string, _ journal.Record, last int64) (int64, bool, error) { return last, true, nil }
	}
	cfg.Batch = or(cfg.Batch, 1)
	cfg.Window = or(cfg.Window, 4096)
	cfg.Concurrency = or(cfg.Concurrency, 256)
	cfg.RedeliveryDelay = or(cfg.RedeliveryDelay, 100*time.Millisecond)
	cfg.RedeliveryDelayMax = max(or(cfg.RedeliveryDelayMax, 3*time.Second), cfg.RedeliveryDelay)
	cfg.DrainTimeout = or(cfg.DrainTimeout, 5*time.Second)
	s := &Subscriber{c: c, cfg: cfg, halted: map[string]error{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Subscribe joins the group once, as one member, with all the comma-separated topics. The channel is closed after
// ctx has ended or Close was called.
func (s *Subscriber) Subscribe(ctx context.Context, topics string) (<-chan *message.Message, error) {
	names := strings.Split(topics, ",")
	if slices.Contains(names, "") || s.cfg.Group == "" {
		return nil, fmt.Errorf("subscribe to %q in group %q: a name is empty", topics, s.cfg.Group)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("subscribe to %q: the subscriber is closed", topics)
	}
	s.wg.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(s.ctx, cancel)
	out := make(chan *message.Message)
	go func() {
		defer s.wg.Done()
		defer close(out)
		defer cancel()
		var share *share
		err := s.c.join(ctx, s.cfg.Group, names,
			func(ses *session) (err error) { share, err = s.newShare(ses, names, out); return err },
			func(*session) { share.run() })
		if err != nil {
			s.c.log.Error("the subscription ended", "group", s.cfg.Group, "topics", topics, "err", err)
		}
	}()
	return out, nil
}

// Close ends all subscriptions: no message is handed out any more, those that are out get DrainTimeout to be answered,
// what is done is committed, and the group is left.
func (s *Subscriber) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	return nil
}

// Halted is nil, or why source partitions are not read any more.
func (s *Subscriber) Halted() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	errs := make([]error, 0, len(s.halted))
	for _, name := range slices.Sorted(maps.Keys(s.halted)) {
		errs = append(errs, s.halted[name])
	}
	return errors.Join(errs...)
}

// share is this member's part of the source partitions during one session.
type share struct {
	s      *Subscriber
	ses    *session
	log    *slog.Logger
	topics []string
	out    chan<- *message.Message
	claims []*claim

	drained chan struct{} // closed when no answer is waited for any more

	mu      sync.Mutex
	ready   []*lane // whose first record can be handed out
	workers int
	ended   bool           // no worker is started any more
	wg      sync.WaitGroup // of workers
}

// claim is one source partition: the records between the first one that is not done and the last one that was read.
type claim struct {
	share     *share
	topic     string
	partition int32
	read      int64 // where reading began
	room      chan struct{}

	mu     sync.Mutex
	window []*entry
	bytes  int
	lanes  map[string]*lane
	done   int64         // all below is done
	last   int64         // what Admit returned for the record before done
	dirty  bool          // not committed
	parked []Parked      // as committed
	halted *Parked       // why it is not read any more
	moved  chan struct{} // closed when done moves; nil when nobody waits for that
}

// entry is a record in the window.
type entry struct {
	record journal.Record
	next   int64 // the offset after it
	last   int64 // what Admit returned for it
	open   int   // targets without an ack
	size   int
}

// lane is the records for one target, in order. The first one is in the ready queue, at a worker, or waits for its
// redelivery.
type lane struct {
	claim  *claim
	target string
	queue  []*entry
	nacks  int // of the first one
	warned time.Time
}

// newShare finds out where to go on: at the committed offset, if its metadata tells Admit's value there. An offset
// without it was not committed by a Subscriber, so everything is read again, and Admit will know what is new.
func (s *Subscriber) newShare(ses *session, topics []string, out chan<- *message.Message) (*share, error) {
	sh := &share{s: s, ses: ses, log: s.c.log.With("group", s.cfg.Group), topics: topics, out: out,
		drained: make(chan struct{})}
	if len(ses.Claims()) == 0 {
		return sh, nil
	}
	committed, err := ses.committed()
	if err != nil {
		return nil, fmt.Errorf("read the committed offsets: %w", err)
	}
	for topic, partitions := range ses.Claims() {
		for _, p := range partitions {
			cl := &claim{share: sh, topic: topic, partition: p, room: make(chan struct{}, 1), lanes: map[string]*lane{}}
			block := committed.GetBlock(topic, p)
			switch {
			case block == nil:
				return nil, fmt.Errorf("read the committed offsets: the answer does not speak of %s partition %d", topic, p)
			case block.Err != 0:
				return nil, fmt.Errorf("read the committed offset of %s partition %d: %w", topic, p, block.Err)
			case block.Offset >= 0:
				if last, parked, ok := parseProgress(block.Metadata); ok {
					cl.done, cl.last, cl.parked = block.Offset, last, parked
					break
				}
				sh.log.Warn("the committed offset has no progress with it, reading from the start",
					"topic", topic, "partition", p, "offset", block.Offset, "metadata", block.Metadata)
				ses.ResetOffset(topic, p, 0, progress(0, nil)) // MarkOffset alone never goes back
			}
			cl.read = cl.done
			sh.claims = append(sh.claims, cl)
		}
	}
	return sh, nil
}

// Parked is a message that is not done although it was tried again and again, so that its target waits.
type Parked struct {
	Seq    int64  `json:"seq"` // what Admit returned for its record, or for the last one that it admitted
	Target string `json:"target"`
	Reason string `json:"reason,omitempty"` // why the whole source partition is halted there; empty when it is not
}

// What is told of parked messages must fit into the metadata of an offset, of which brokers take 4 KiB.
const (
	parkedTold  = 8
	reasonBytes = 200
)

// progress is the metadata of a committed offset.
func progress(last int64, parked []Parked) string {
	text := progressPrefix + strconv.FormatInt(last, 10)
	if len(parked) > 0 {
		data, err := json.Marshal(parked)
		if err == nil { // which it always is
			text += " " + string(data)
		}
	}
	return text
}

func parseProgress(metadata string) (last int64, parked []Parked, ok bool) {
	value, ours := strings.CutPrefix(metadata, progressPrefix)
	value, more, _ := strings.Cut(value, " ")
	last, err := strconv.ParseInt(value, 10, 64)
	if json.Unmarshal([]byte(more), &parked) != nil {
		parked = nil
	}
	return last, parked, ours && err == nil
}

// run reads and hands out until the session ends, and then commits what is done.
func (sh *share) run() {
	ctx := sh.ses.Context()
	var wg sync.WaitGroup
	for _, cl := range sh.claims {
		wg.Go(func() { cl.intake(ctx) })
	}
	if sh.s.cfg.Owned != nil {
		for _, p := range sh.ses.heldOfAll(sh.topics) {
			wg.Go(func() {
				sh.s.cfg.Owned(ctx, p, func(ctx context.Context) error { return sh.caughtUp(ctx, p) })
			})
		}
	}
	for ticker := time.NewTicker(commitInterval); ctx.Err() == nil; {
		select {
		case <-ticker.C:
			sh.commit()
		case <-ctx.Done():
			ticker.Stop()
		}
	}
	wait := time.AfterFunc(sh.s.cfg.DrainTimeout, func() { close(sh.drained) })
	sh.mu.Lock()
	sh.ended = true
	sh.mu.Unlock()
	wg.Wait()
	sh.wg.Wait()
	wait.Stop()
	sh.commit()

	sh.s.mu.Lock()
	defer sh.s.mu.Unlock()
	for _, cl := range sh.claims {
		delete(sh.s.halted, cl.name())
	}
}

func (sh *share) commit() {
	dirty := false
	for _, cl := range sh.claims {
		cl.mu.Lock()
		if parked := cl.waiting(); cl.dirty || !slices.Equal(parked, cl.parked) {
			// The one only goes forward, the other changes the metadata of an offset that stays.
			sh.ses.MarkOffset(cl.topic, cl.partition, cl.done, progress(cl.last, parked))
			sh.ses.ResetOffset(cl.topic, cl.partition, cl.done, progress(cl.last, parked))
			cl.dirty, dirty, cl.parked = false, true, parked
		}
		cl.mu.Unlock()
	}
	if dirty {
		sh.ses.Commit()
	}
}

// caughtUp waits until what is now in the source partitions of that number is done.
func (sh *share) caughtUp(ctx context.Context, partition int32) error {
	for _, cl := range sh.claims {
		if cl.partition != partition {
			continue
		}
		end, err := sh.s.c.Reader(cl.topic).End(ctx, partition)
		if err != nil {
			return err
		}
		if err := cl.await(ctx, end); err != nil {
			return err
		}
	}
	return nil
}

// waiting is what is parked; cl.mu is held.
func (cl *claim) waiting() (parked []Parked) {
	for _, l := range cl.lanes {
		if l.nacks >= stuckAfter {
			parked = append(parked, Parked{Seq: l.queue[0].last, Target: l.target})
		}
	}
	slices.SortFunc(parked, func(a, b Parked) int { return cmp.Or(cmp.Compare(a.Seq, b.Seq), cmp.Compare(a.Target, b.Target)) })
	if cl.halted != nil {
		parked = append([]Parked{*cl.halted}, parked...)
	}
	return parked[:min(len(parked), parkedTold)]
}

func (cl *claim) name() string { return fmt.Sprintf("%s/%d", cl.topic, cl.partition) }

// intake reads the source partition into the window.
func (cl *claim) intake(ctx context.Context) {
	last := cl.last
	offset := cl.read
	key := ""
	err := cl.share.s.c.Reader(cl.topic).Read(ctx, cl.partition, cl.read, func(b journal.Batch) error {
		for i, r := range b.Records {
			offset, key = r.Offset, string(r.Key)
			next, process, err := cl.share.s.cfg.Admit(cl.topic, r, last)
			if err != nil {
				return err
			}
			last = next
			e := &entry{record: r, next: r.Offset + 1, last: last, size: size(r)}
			if i == len(b.Records)-1 {
				e.next = b.Next
			}
			if err := cl.add(ctx, e, process); err != nil {
				return err
			}
		}
		if len(b.Records) == 0 {
			return cl.add(ctx, &entry{next: b.Next, last: last}, false)
		}
		return nil
	})
	if ctx.Err() != nil || errors.Is(err, ErrClosed) {
		return
	}
	err = fmt.Errorf("%s partition %d is halted at offset %d: %w", cl.topic, cl.partition, offset, err)
	cl.share.log.Error("a source partition is halted",
		"topic", cl.topic, "partition", cl.partition, "offset", offset, "err", err)
	cl.mu.Lock()
	reason := strings.ToValidUTF8(err.Error()[:min(len(err.Error()), reasonBytes)], "")
	cl.halted = &Parked{Seq: last, Target: key, Reason: reason}
	cl.mu.Unlock()
	cl.share.s.mu.Lock()
	defer cl.share.s.mu.Unlock()
	cl.share.s.halted[cl.name()] = err
}

func size(r journal.Record) int {
	n := 256 + len(r.Key) + len(r.Value)
	for _, h := range r.Headers {
		n += len(h.Key) + len(h.Value)
	}
	return n
}

// add puts the record into the window, once there is room, and into the lane of each of its targets.
func (cl *claim) add(ctx context.Context, e *entry, process bool) error {
	var targets []string
	if process {
		msg := newMessage(cl.topic, e.record)
		msg.SetContext(context.WithValue(ctx, deliveryKey{}, delivery{topic: cl.topic, records: []journal.Record{e.record}}))
		found, err := cl.share.s.cfg.Targets(msg)
		if err != nil {
			return err
		}
		targets = slices.Clone(found)
		slices.Sort(targets)
		targets = slices.Compact(targets)
	}
	cl.mu.Lock()
	for len(cl.window) >= cl.share.s.cfg.Window || cl.bytes > windowBytes {
		cl.mu.Unlock()
		select {
		case <-cl.room:
		case <-ctx.Done():
			return ctx.Err()
		}
		cl.mu.Lock()
	}
	var ready []*lane
	e.open = len(targets)
	cl.window = append(cl.window, e)
	cl.bytes += e.size
	for _, t := range targets {
		l := cl.lanes[t]
		if l == nil {
			l = &lane{claim: cl, target: t}
			cl.lanes[t] = l
			ready = append(ready, l)
		}
		l.queue = append(l.queue, e)
	}
	cl.advance()
	cl.mu.Unlock()
	for _, l := range ready {
		cl.share.enqueue(l)
	}
	return nil
}

// advance moves done over the records that are; cl.mu is held.
func (cl *claim) advance() {
	n := 0
	for n < len(cl.window) && cl.window[n].open == 0 {
		cl.done, cl.last, cl.dirty = cl.window[n].next, cl.window[n].last, true
		cl.bytes -= cl.window[n].size
		cl.window[n] = nil
		n++
	}
	if n == 0 {
		return
	}
	cl.window = cl.window[n:]
	if cl.moved != nil {
		close(cl.moved)
		cl.moved = nil
	}
	select {
	case cl.room <- struct{}{}:
	default:
	}
}

// await returns when all below the offset is done.
func (cl *claim) await(ctx context.Context, offset int64) error {
	for {
		cl.mu.Lock()
		if cl.done >= offset {
			cl.mu.Unlock()
			return nil
		}
		if cl.moved == nil {
			cl.moved = make(chan struct{})
		}
		moved := cl.moved
		cl.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// enqueue makes the lane's first record the business of a worker. Workers come and go with the work.
func (sh *share) enqueue(l *lane) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.ready = append(sh.ready, l)
	if sh.workers < sh.s.cfg.Concurrency && !sh.ended {
		sh.workers++
		sh.wg.Add(1)
		go sh.work()
	}
}

func (sh *share) work() {
	defer sh.wg.Done()
	for {
		sh.mu.Lock()
		if len(sh.ready) == 0 || sh.ended {
			sh.workers--
			sh.mu.Unlock()
			return
		}
		l := sh.ready[0]
		sh.ready[0] = nil
		sh.ready = sh.ready[1:]
		sh.mu.Unlock()
		l.deliver()
	}
}

// deliver hands out the lane's first records and waits for the answer.
func (l *lane) deliver() {
	cl, sh := l.claim, l.claim.share
	cl.mu.Lock()
	run := slices.Clone(l.queue[:min(len(l.queue), sh.s.cfg.Batch)])
	cl.mu.Unlock()
	d := delivery{topic: cl.topic, target: l.target, records: make([]journal.Record, len(run))}
	for i, e := range run {
		d.records[i] = e.record
	}
	msg := newMessage(cl.topic, d.records[0])
	ctx, cancel := context.WithCancel(context.WithValue(sh.ses.Context(), deliveryKey{}, d))
	defer cancel()
	msg.SetContext(ctx)
	select {
	case sh.out <- msg:
	case <-ctx.Done():
		return
	}
	select {
	case <-msg.Acked():
		l.acked(run)
	case <-msg.Nacked():
		l.nacked(run[0])
	case <-sh.drained:
	}
}

func (l *lane) acked(run []*entry) {
	cl := l.claim
	cl.mu.Lock()
	l.nacks = 0
	clear(l.queue[:len(run)])
	l.queue = l.queue[len(run):]
	more := len(l.queue) > 0
	if !more {
		delete(cl.lanes, l.target)
	}
	done := false
	for _, e := range run {
		e.open--
		done = done || e.open == 0
	}
	if done {
		cl.advance()
	}
	cl.mu.Unlock()
	if more {
		cl.share.enqueue(l)
	}
}

func (l *lane) nacked(e *entry) {
	cl, sh := l.claim, l.claim.share
	if sh.ses.Context().Err() != nil {
		return
	}
	cfg := sh.s.cfg
	cl.mu.Lock()
	delay := min(cfg.RedeliveryDelay<<min(l.nacks, 16), cfg.RedeliveryDelayMax)
	l.nacks++
	cl.mu.Unlock()
	if l.nacks >= stuckAfter && time.Since(l.warned) > stuckInterval {
		l.warned = time.Now()
		cl.mu.Lock()
		waiting := len(cl.window)
		cl.mu.Unlock()
		sh.log.Warn("a target is stuck: its message is nacked again and again, and others wait behind it",
			"topic", cl.topic, "partition", cl.partition, "offset", e.record.Offset, "target", l.target,
			"nacks", l.nacks, "waiting", waiting, "window", cfg.Window)
	}
	time.AfterFunc(delay, func() { sh.enqueue(l) })
}
