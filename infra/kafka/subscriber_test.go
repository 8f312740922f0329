package kafka

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/ThreeDotsLabs/watermill/message"

	"wharf/infra/journal"
)

var (
	_ message.Subscriber = (*Subscriber)(nil)
	_ message.Publisher  = (*Publisher)(nil)
)

// forTargets is one record for each list of targets ("a b"), with the number of the record as its value.
func forTargets(targets ...string) []journal.Record {
	rs := numbered(0, 0, len(targets))
	for i := range rs {
		rs[i].Headers = []journal.Header{header("targets", targets[i])}
	}
	return rs
}

// testConfig hands out by the header "targets", and admits everything, counting.
func testConfig(group string) SubscriberConfig {
	return SubscriberConfig{
		Group:   group,
		Targets: func(msg *message.Message) ([]string, error) { return strings.Fields(msg.Metadata["targets"]), nil },
		Admit: func(_ string, _ journal.Record, last int64) (int64, bool, error) {
			return last + 1, true, nil
		},
		RedeliveryDelay:    time.Millisecond,
		RedeliveryDelayMax: 5 * time.Millisecond,
		DrainTimeout:       100 * time.Millisecond,
	}
}

// subscription is a subscriber under test.
type subscription struct {
	*Subscriber
	t    *testing.T
	msgs <-chan *message.Message
}

func subscribe(t *testing.T, c *Client, topics string, cfg SubscriberConfig) *subscription {
	t.Helper()
	s := &subscription{NewSubscriber(c, cfg), t, nil}
	t.Cleanup(func() { _ = s.Close() })
	var err error
	if s.msgs, err = s.Subscribe(t.Context(), topics); err != nil {
		t.Fatal(err)
	}
	return s
}

func describe(msg *message.Message) string { return TargetOf(msg) + string(msg.Payload) }

// next is the next message that is handed out.
func (s *subscription) next() *message.Message {
	s.t.Helper()
	select {
	case msg := <-s.msgs:
		return msg
	case <-time.After(wait):
		s.t.Fatal("no message comes")
		return nil
	}
}

// want is the next messages, in any order, told by target and value.
func (s *subscription) want(wanted ...string) map[string]*message.Message {
	s.t.Helper()
	got := map[string]*message.Message{}
	for range wanted {
		msg := s.next()
		got[describe(msg)] = msg
	}
	for _, w := range wanted {
		if got[w] == nil {
			s.t.Fatalf("got %v, want %v", got, wanted)
		}
	}
	return got
}

// wantNothing checks that no message is handed out, for as long as it takes that one which could be would be.
func (s *subscription) wantNothing() {
	s.t.Helper()
	select {
	case msg := <-s.msgs:
		s.t.Fatalf("got %s, want nothing", describe(msg))
	case <-time.After(50 * time.Millisecond):
	}
}

// committed is the committed offset and metadata.
func committed(t *testing.T, c *Client, group, topic string, partition int32) (offset int64, metadata string) {
	t.Helper()
	a, err := sarama.NewClusterAdminFromClient(c.sarama)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := a.ListConsumerGroupOffsets(group, map[string][]int32{topic: {partition}})
	if err != nil {
		t.Fatal(err)
	}
	block := resp.GetBlock(topic, partition)
	return block.Offset, block.Metadata
}

func TestHandsOutByTargetInOrder(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 1)
	appendAll(t, c.PublicLog(name), 0, forTargets("a", "a b b", "", "b", "c", "a"))
	s := subscribe(t, c, name, testConfig(name))

	got := s.want("a0", "b1", "c4") // one per target
	s.wantNothing()
	if topic, r := RecordOf(got["b1"]); topic != name || r.Offset != 1 || string(r.Key) != "k1" {
		t.Errorf("got record %+v of %s", r, topic)
	}
	got["b1"].Ack()
	b3 := s.want("b3")["b3"]
	got["a0"].Ack()
	a1 := s.want("a1")["a1"]
	s.wantNothing()
	a1.Ack()
	a5 := s.want("a5")["a5"]
	b3.Ack()
	got["c4"].Ack()
	if err := s.Close(); err != nil { // with a5 out
		t.Fatal(err)
	}
	select {
	case <-a5.Context().Done():
	default:
		t.Error("the context of a message goes on after its session")
	}
	if offset, metadata := committed(t, c, name, name, 0); offset != 5 || metadata != "wharf:5" {
		t.Errorf("committed %d %q, want 5 wharf:5", offset, metadata)
	}
}

// A record is done when all its targets have acked; only what is done without a gap is committed, and the next
// subscriber goes on from there, with Admit's value there.
func TestCommitsTheDonePrefix(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 2)
	appendAll(t, c.PublicLog(name), 0, forTargets("a", "b c", "d", "e"))
	s := subscribe(t, c, name, testConfig(name))
	got := s.want("a0", "b1", "c1", "d2", "e3")
	for _, acked := range []string{"a0", "b1", "d2", "e3"} {
		got[acked].Ack()
	}
	_ = s.Close()
	if offset, metadata := committed(t, c, name, name, 0); offset != 1 || metadata != "wharf:1" {
		t.Errorf("committed %d %q, want 1 wharf:1", offset, metadata)
	}
	if offset, _ := committed(t, c, name, name, 1); offset != -1 {
		t.Errorf("committed %d of a partition that nothing is in", offset)
	}

	cfg := testConfig(name)
	first := make(chan int64, 10)
	cfg.Admit = func(_ string, _ journal.Record, last int64) (int64, bool, error) {
		first <- last
		return last + 1, true, nil
	}
	s = subscribe(t, c, name, cfg)
	for _, msg := range s.want("b1", "c1", "d2", "e3") {
		msg.Ack()
	}
	if last := <-first; last != 1 {
		t.Errorf("Admit goes on from %d, want 1", last)
	}
	_ = s.Close()
	if offset, metadata := committed(t, c, name, name, 0); offset != 4 || metadata != "wharf:4" {
		t.Errorf("committed %d %q, want 4 wharf:4", offset, metadata)
	}
}

// An offset that was committed without progress says nothing: all is read again.
func TestCommitWithoutProgressIsNotBelieved(t *testing.T) {
	c := connect(t, brokers(t))
	for _, metadata := range []string{"", "wharf:", "wharf:x", "other"} {
		t.Run(metadata, func(t *testing.T) {
			name := topic(t, c, 1)
			appendAll(t, c.PublicLog(name), 0, forTargets("a", "b", "c"))
			a, err := sarama.NewClusterAdminFromClient(c.sarama)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := a.AlterConsumerGroupOffsets(name, map[string]map[int32]sarama.OffsetAndMetadata{
				name: {0: {Offset: 3, LeaderEpoch: -1, Metadata: metadata}}}, nil); err != nil {
				t.Fatal(err)
			}
			s := subscribe(t, c, name, testConfig(name))
			got := s.want("a0", "b1", "c2")
			got["a0"].Ack()
			got["c2"].Ack()
			_ = s.Close()
			if offset, metadata := committed(t, c, name, name, 0); offset != 1 || metadata != "wharf:1" {
				t.Errorf("committed %d %q, want 1 wharf:1", offset, metadata)
			}
		})
	}
}

func TestNackBlocksItsTargetAlone(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 1)
	appendAll(t, c.PublicLog(name), 0, forTargets("a", "b", "a", "b", "b"))
	s := subscribe(t, c, name, testConfig(name))
	var done []string
	for nacks := 0; len(done) < 3 || nacks < 5; {
		msg := s.next()
		switch TargetOf(msg) {
		case "a":
			if string(msg.Payload) != "0" {
				t.Fatalf("got %s before a0 was acked", describe(msg))
			}
			nacks++
			msg.Nack()
		case "b":
			done = append(done, describe(msg))
			msg.Ack()
		}
	}
	if fmt.Sprint(done) != "[b1 b3 b4]" {
		t.Errorf("got %v", done)
	}
	s.want("a0")["a0"].Ack()
	s.want("a2")["a2"].Ack()
}

// A message that is never acked stops only its target, until the window is full.
func TestWindowIsBounded(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 1)
	appendAll(t, c.PublicLog(name), 0, forTargets("a", "b", "b", "b", "b", "b", "b"))
	cfg := testConfig(name)
	cfg.Window = 4
	s := subscribe(t, c, name, cfg)
	var a *message.Message
	for n := 0; n < 4; n++ {
		if msg := s.next(); TargetOf(msg) == "a" {
			a = msg
		} else {
			msg.Ack()
		}
	}
	s.wantNothing()
	a.Ack()
	for _, w := range []string{"b4", "b5", "b6"} {
		s.want(w)[w].Ack()
	}
}

func TestStuckTargetIsNamed(t *testing.T) {
	c := connect(t, brokers(t))
	var log bytes.Buffer
	var mu sync.Mutex
	c.log = slog.New(slog.NewTextHandler(writer(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return log.Write(p)
	}), nil))
	name := topic(t, c, 1)
	appendAll(t, c.PublicLog(name), 0, forTargets("sku-17"))
	s := subscribe(t, c, name, testConfig(name))
	for range stuckAfter + 5 {
		s.next().Nack()
	}
	_ = s.Close()
	if n := strings.Count(log.String(), "target=sku-17"); n != 1 {
		t.Errorf("it is named %d times, want once:\n%s", n, &log)
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

func TestAdmit(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 2)
	appendAll(t, c.PublicLog(name), 0, forTargets("a", "b", "c", "d"))
	appendAll(t, c.PublicLog(name), 1, forTargets("e", "f", "g", "h"))
	cfg := testConfig(name)
	gap := errors.New("a gap")
	cfg.Admit = func(_ string, r journal.Record, last int64) (int64, bool, error) {
		switch {
		case r.Offset == 1:
			return last, false, nil // not to be processed
		case r.Partition == 0 && r.Offset == 3:
			return 99, true, gap
		}
		return last + 10, true, nil
	}
	s := subscribe(t, c, name, cfg)
	for _, msg := range s.want("a0", "c2", "e0", "g2", "h3") {
		msg.Ack()
	}
	appendAll(t, c.PublicLog(name), 0, forTargets("never"))
	appendAll(t, c.PublicLog(name), 1, forTargets("i"))
	s.want("i0")["i0"].Ack()
	s.wantNothing()
	err := s.Halted()
	if !errors.Is(err, gap) || !strings.Contains(err.Error(), name+" partition 0 is halted at offset 3") {
		t.Errorf("got %v, want an error that names partition and offset", err)
	}
	_ = s.Close()
	for p, want := range []string{"3 wharf:20", "5 wharf:40"} {
		offset, metadata := committed(t, c, name, name, int32(p))
		progress, _, _ := strings.Cut(metadata, " ") // what is parked comes after it
		if fmt.Sprint(offset, " ", progress) != want {
			t.Errorf("partition %d: committed %d %q, want %s", p, offset, metadata, want)
		}
	}
	_, parked, err := c.GroupLag(t.Context(), name, []string{name})
	if err != nil || len(parked) != 1 || parked[0].Partition != 0 || parked[0].Seq != 20 || !strings.Contains(parked[0].Reason, "gap") {
		t.Errorf("parked is %+v: %v", parked, err)
	}
}

// A source that lost records halts; it is not read from somewhere else.
func TestLostRecordsHalt(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 1)
	a, err := sarama.NewClusterAdminFromClient(c.sarama)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.AlterConsumerGroupOffsets(name, map[string]map[int32]sarama.OffsetAndMetadata{
		name: {0: {Offset: 7, LeaderEpoch: -1, Metadata: "wharf:7"}}}, nil); err != nil {
		t.Fatal(err)
	}
	appendAll(t, c.PublicLog(name), 0, forTargets("a"))
	s := subscribe(t, c, name, testConfig(name))
	for s.Halted() == nil {
		s.wantNothing()
	}
	var gone *OutOfRangeError
	if err := s.Halted(); !errors.As(err, &gone) {
		t.Errorf("got %v, want an OutOfRangeError", err)
	}
}

// Owned runs per partition number, and is told when all that was there is done.
func TestOwnedCatchesUp(t *testing.T) {
	c := connect(t, brokers(t))
	a, b := topic(t, c, 2), topic(t, c, 2)
	appendAll(t, c.PublicLog(a), 0, forTargets("x", "y"))
	appendAll(t, c.PublicLog(b), 0, forTargets("z"))
	cfg := testConfig(a)
	up := make(chan int32)
	var running sync.WaitGroup
	running.Add(2)
	cfg.Owned = func(ctx context.Context, p int32, caughtUp func(context.Context) error) {
		defer running.Done()
		if err := caughtUp(ctx); err != nil {
			t.Errorf("partition %d: %v", p, err)
		}
		up <- p
		<-ctx.Done()
	}
	s := subscribe(t, c, a+","+b, cfg)
	if p := <-up; p != 1 { // where nothing is
		t.Errorf("partition %d is the first to have caught up", p)
	}
	got := s.want("x0", "y1", "z0")
	got["x0"].Ack()
	got["z0"].Ack()
	select {
	case <-up:
		t.Error("caught up with a message out")
	case <-time.After(50 * time.Millisecond):
	}
	got["y1"].Ack()
	<-up
	_ = s.Close()
	running.Wait()
}

// Many members come and go; nothing is lost, and the order per target holds among the first deliveries.
func TestTakeover(t *testing.T) {
	c := connect(t, brokers(t))
	const partitions, n, targets = 4, 200, 5
	name := topic(t, c, partitions)
	for p := range int32(partitions) {
		rs := numbered(p, 0, n)
		for i := range rs {
			rs[i].Headers = []journal.Header{header("targets", fmt.Sprint("t", i%targets))}
		}
		appendAll(t, c.PublicLog(name), p, rs)
	}
	var mu sync.Mutex
	seen := map[string]int{} // the highest value acked, per partition and target
	left := partitions * n
	all := make(chan struct{})
	handle := func(msg *message.Message) {
		_, r := RecordOf(msg)
		value, _ := strconv.Atoi(string(r.Value))
		lane := fmt.Sprint(r.Partition, TargetOf(msg))
		mu.Lock()
		defer mu.Unlock()
		last, started := seen[lane]
		switch {
		case !started && value < targets, started && value == last+targets:
			seen[lane] = value
			if left--; left == 0 {
				close(all)
			}
		case value > last:
			t.Errorf("%s: %d follows %d", lane, value, last)
		}
		msg.Ack()
	}
	var wg sync.WaitGroup
	start := func(limit int) *Subscriber {
		cfg := testConfig(name)
		cfg.DrainTimeout = wait
		cfg.Window = 16
		s := NewSubscriber(c, cfg)
		msgs, err := s.Subscribe(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			handled := 0
			for msg := range msgs {
				handle(msg)
				if handled++; handled == limit {
					go s.Close()
				}
			}
		})
		return s
	}
	for range 3 {
		start(50)
	}
	last := start(0)
	select {
	case <-all:
	case <-time.After(wait):
		t.Error("not everything was handed out")
	}
	_ = last.Close()
	wg.Wait()
}

// What is out when partitions are given up may be answered in time, but is not waited for for ever.
func TestDrain(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 1)
	appendAll(t, c.PublicLog(name), 0, forTargets("a", "b", "c"))
	cfg := testConfig(name)
	cfg.DrainTimeout = wait
	s := subscribe(t, c, name, cfg)
	got := s.want("a0", "b1", "c2")
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	<-got["a0"].Context().Done()
	got["a0"].Ack()
	got["b1"].Nack() // does not come again
	got["c2"].Ack()
	select {
	case <-closed:
	case <-time.After(wait / 2):
		t.Error("Close waits although everything was answered")
	}
	if offset, _ := committed(t, c, name, name, 0); offset != 1 {
		t.Errorf("committed %d, want 1", offset)
	}
}

func TestSubscribeErrors(t *testing.T) {
	c := connect(t, brokers(t))
	s := NewSubscriber(c, SubscriberConfig{Group: "g"})
	if _, err := s.Subscribe(t.Context(), "a,,b"); err == nil {
		t.Error("an empty topic: want an error")
	}
	_ = s.Close()
	if _, err := s.Subscribe(t.Context(), "a"); err == nil {
		t.Error("closed: want an error")
	}
}
