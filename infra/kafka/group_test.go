package kafka

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// owners keeps who owns what, and that nothing has two owners.
type owners struct {
	t       testing.TB
	hold    chan struct{} // unless nil: nobody lets go before it is closed
	mu      sync.Mutex
	of      map[int32]string
	changed chan struct{}
}

func newOwners(t testing.TB) *owners {
	return &owners{t: t, of: map[int32]string{}, changed: make(chan struct{})}
}

func (o *owners) set(p int32, from, to string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.of[p] != from {
		o.t.Errorf("partition %d goes from %q to %q, but %q owns it", p, from, to, o.of[p])
	}
	o.of[p] = to
	close(o.changed)
	o.changed = make(chan struct{})
}

// member is a group member until ctx ends.
func (o *owners) member(ctx context.Context, c *Client, name, group string, topics []string) func() {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.RunGroup(ctx, group, topics, func(ctx context.Context, p int32) {
			o.set(p, "", name)
			<-ctx.Done()
			if o.hold != nil {
				o.set(p, name, name+" lets go")
				<-o.hold
				o.set(p, name+" lets go", "")
				return
			}
			o.set(p, name, "")
		}); err != nil {
			o.t.Error(err)
		}
	}()
	return func() { cancel(); <-done }
}

// await waits until everything is owned as wanted.
func (o *owners) await(ctx context.Context, what string, wanted func(count map[string]int) bool) {
	o.t.Helper()
	for {
		o.mu.Lock()
		count := map[string]int{}
		for _, name := range o.of {
			count[name]++
		}
		changed := o.changed
		o.mu.Unlock()
		if wanted(count) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			o.t.Fatalf("%s: owners are %v", what, count)
		}
	}
}

func TestGroupSharesAndTakesOver(t *testing.T) {
	c := connect(t, brokers(t))
	a, b := topic(t, c, 7), topic(t, c, 7)
	topics := []string{a, b}
	o := newOwners(t)
	ctx := bounded(t)
	stop1 := o.member(ctx, c, "one", a, topics)
	o.await(ctx, "one member", func(n map[string]int) bool { return n["one"] == 7 })
	stop2 := o.member(ctx, c, "two", a, topics)
	o.await(ctx, "two members", func(n map[string]int) bool {
		return n["one"]+n["two"] == 7 && n["one"] >= 3 && n["two"] >= 3
	})
	stop1()
	o.await(ctx, "one has left", func(n map[string]int) bool { return n["two"] == 7 })
	stop2()
	o.await(ctx, "all have left", func(n map[string]int) bool { return n[""] == 7 })
}

// Nobody gets a partition before the one who had it has let go.
func TestGroupWaitsForOwned(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 2)
	o := newOwners(t)
	o.hold = make(chan struct{})
	ctx := bounded(t)
	stop1 := o.member(ctx, c, "one", name, []string{name})
	o.await(ctx, "one member", func(n map[string]int) bool { return n["one"] == 2 })
	stop2 := o.member(ctx, c, "two", name, []string{name})
	o.await(ctx, "two wants in", func(n map[string]int) bool { return n["one lets go"] == 2 })
	time.AfterFunc(500*time.Millisecond, func() { close(o.hold) }) // several heartbeats
	o.await(ctx, "two members", func(n map[string]int) bool { return n["one"] == 1 && n["two"] == 1 })
	stop1()
	stop2()
}

// A partition number belongs to nobody unless all topics have it.
func TestGroupOwnsWhatAllTopicsHave(t *testing.T) {
	c := connect(t, brokers(t))
	topics := []string{topic(t, c, 3), topic(t, c, 2)}
	o := newOwners(t)
	ctx := bounded(t)
	stop := o.member(ctx, c, "one", topics[0], topics)
	o.await(ctx, "one member", func(n map[string]int) bool { return n["one"] == 2 })
	stop()
	if _, owned := o.of[2]; owned {
		t.Error("partition 2 was owned, which only one topic has")
	}
}

// The broker loses the group's state and cuts connections: the member comes back.
func TestGroupSurvivesFaults(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1), kfake.GroupMinSessionTimeout(1))
	c := connect(t, cluster.ListenAddrs())
	name := topic(t, c, 2)
	o := newOwners(t)
	ctx := bounded(t)
	var mu sync.Mutex
	fail := 0
	for _, key := range []kmsg.Key{kmsg.Heartbeat, kmsg.JoinGroup, kmsg.SyncGroup, kmsg.OffsetFetch} {
		cluster.ControlKey(int16(key), func(kmsg.Request) (kmsg.Response, error, bool) {
			cluster.KeepControl()
			mu.Lock()
			defer mu.Unlock()
			if fail > 0 {
				fail--
				return nil, errors.New("the connection breaks"), true
			}
			return nil, nil, false
		})
	}
	stop := o.member(ctx, c, "one", "g", []string{name})
	o.await(ctx, "at first", func(n map[string]int) bool { return n["one"] == 2 })
	mu.Lock()
	fail = 8
	mu.Unlock()
	o.await(ctx, "the session breaks", func(n map[string]int) bool { return n["one"] == 0 })
	o.await(ctx, "it is back", func(n map[string]int) bool { return n["one"] == 2 })
	stop()
}

// A cluster that allows no session as short as ours takes us with a longer one.
func TestGroupTakesTheSessionThatItIsAllowed(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1), kfake.GroupMinSessionTimeout(10*time.Second))
	c := connect(t, cluster.ListenAddrs())
	name := topic(t, c, 2)
	o := newOwners(t)
	stop := o.member(bounded(t), c, "one", "g", []string{name})
	o.await(bounded(t), "one member", func(n map[string]int) bool { return n["one"] == 2 })
	stop()
}

func TestGroupNeedsTopics(t *testing.T) {
	c := connect(t, brokers(t))
	if err := c.RunGroup(t.Context(), "g", nil, nil); err == nil {
		t.Error("want an error")
	}
}

func TestGroupLag(t *testing.T) {
	c := connect(t, brokers(t))
	a, b := topic(t, c, 2), topic(t, c, 2)
	appendAll(t, c.PublicLog(a), 0, numbered(0, 0, 10))
	appendAll(t, c.PublicLog(b), 1, numbered(1, 0, 5))
	wantLag := func(want int64) {
		t.Helper()
		if lag, _, err := c.GroupLag(t.Context(), a, []string{a, b}); err != nil || lag != want {
			t.Errorf("the lag is %d, %v, want %d", lag, err, want)
		}
	}
	wantLag(15)
	sub := NewSubscriber(c, SubscriberConfig{Group: a})
	msgs, err := sub.Subscribe(t.Context(), a+","+b)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 15 {
		msg := <-msgs
		if topic, r := RecordOf(msg); !slices.Contains([]string{a, b}, topic) || string(msg.Payload) != string(r.Value) {
			t.Errorf("message %d is of topic %q", n, topic)
		}
		msg.Ack()
	}
	if err := sub.Close(); err != nil {
		t.Fatal(err)
	}
	wantLag(0)
	if _, _, err := c.GroupLag(bounded(t), a, []string{"no-such-topic"}); err == nil {
		t.Error("want an error for a topic that does not exist")
	}
}
