package kafka

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.uber.org/goleak"

	"wharf/infra/embedded/apache"
	"wharf/infra/journal"
)

// The tests speak the real protocol: to a broker in this process, or to the one at WHARF_TEST_KAFKA (host:port). With
// WHARF_TEST_APACHE=1, as `make test-kafka` sets it, that is an Apache Kafka started for them.

const wait = 30 * time.Second // bounds what must happen; nothing is expected to take that long

var onApache = os.Getenv("WHARF_TEST_APACHE") == "1"

func TestMain(m *testing.M) {
	stop := func() {}
	if onApache && os.Getenv("WHARF_TEST_KAFKA") == "" {
		var err error
		if stop, err = startApache(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent(), goleak.Cleanup(func(code int) { stop(); os.Exit(code) }),
		goleak.IgnoreAnyFunction("github.com/Shopify/toxiproxy/v2.(*ToxicLink).read"), // they leak
		goleak.IgnoreAnyFunction("github.com/Shopify/toxiproxy/v2/toxics.(*ToxicStub).Run"))
}

func startApache() (stop func(), err error) {
	dir, err := os.MkdirTemp("", "wharf-apache-")
	if err != nil {
		return nil, err
	}
	cluster, err := apache.Start(context.Background(), dir, 1)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return func() { cluster.Stop(); _ = os.RemoveAll(dir) }, os.Setenv("WHARF_TEST_KAFKA", cluster.Addrs()[0])
}

// brokers is the address of a broker: a new one, but where a real one is given.
func brokers(t testing.TB, opts ...kfake.Opt) []string {
	if real := os.Getenv("WHARF_TEST_KAFKA"); real != "" {
		return strings.Split(real, ",")
	}
	opts = append([]kfake.Opt{kfake.NumBrokers(1), kfake.GroupMinSessionTimeout(time.Second)}, opts...)
	return fake(t, opts...).ListenAddrs()
}

// fake is a broker in this process that does what the test says. The test is skipped where a real one is given.
func fake(t testing.TB, opts ...kfake.Opt) *kfake.Cluster {
	onlyFake(t)
	cluster, err := kfake.NewCluster(opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cluster.Close)
	return cluster
}

func connect(t testing.TB, brokers []string) *Client { return connectWith(t, Config{Brokers: brokers}) }

func connectWith(t testing.TB, cfg Config) *Client {
	level := slog.LevelError
	if testing.Verbose() {
		level = slog.LevelWarn
	}
	cfg.Heartbeat, cfg.SessionTimeout = 100*time.Millisecond, 6*time.Second
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level}))
	c, err := Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// topic creates a topic that nobody else uses.
func topic(t testing.TB, c *Client, partitions int32) string { return topicOf(t, c, partitions, 1) }

func topicOf(t testing.TB, c *Client, partitions int32, replication int16) string {
	name := regexp.MustCompile(`[^a-zA-Z0-9]+`).ReplaceAllString(t.Name(), "-") + "-" + uuid.NewString()[:8]
	if err := c.CreateTopics(t.Context(), []TopicSpec{{name, partitions, replication}}); err != nil {
		t.Fatal(err)
	}
	return name
}

// bounded is the test's context with a time-out.
func bounded(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	t.Cleanup(cancel)
	return ctx
}

// numbered is n records for a partition, whose values are numbers from `from` on.
func numbered(partition int32, from, n int) []journal.Record {
	rs := make([]journal.Record, n)
	for i := range rs {
		v := strconv.Itoa(from + i)
		rs[i] = journal.Record{Partition: partition, Key: []byte("k" + v), Value: []byte(v)}
	}
	return rs
}

func appendAll(t testing.TB, log *PublicLog, partition int32, records []journal.Record) {
	t.Helper()
	if err := log.AppendBatch(t.Context(), partition, records); err != nil {
		t.Fatal(err)
	}
}

func TestConnectNamesTheBrokers(t *testing.T) {
	_, err := Connect(t.Context(), Config{Brokers: []string{"127.0.0.1:1"}, ConnectTimeout: 300 * time.Millisecond})
	if err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Fatalf("got %v, want an error that names the broker", err)
	}
}

func TestClosedClient(t *testing.T) {
	c := connect(t, brokers(t))
	name := topic(t, c, 1)
	log := c.Log(name)
	reading := make(chan error)
	seen := make(chan struct{})
	go func() {
		reading <- log.Read(context.Background(), 0, 0, func(journal.Batch) error { close(seen); return nil })
	}()
	if err := log.Append(t.Context(), numbered(0, 0, 1)[0]); err != nil {
		t.Fatal(err)
	}
	<-seen
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-reading; err != ErrClosed {
		t.Errorf("Read: got %v, want ErrClosed", err)
	}
	if err := log.Append(t.Context(), numbered(0, 0, 1)[0]); err == nil {
		t.Error("Append: want an error")
	}
	if _, err := log.End(t.Context(), 0); err == nil {
		t.Error("End: want an error")
	}
	if err := log.Read(t.Context(), 0, 0, func(journal.Batch) error { return nil }); err != ErrClosed {
		t.Errorf("Read: got %v, want ErrClosed", err)
	}
}

// A broker that was paused for longer than answers are waited for answers late. That must not make a connection useless
// for ever.
func TestALateAnswerSpoilsNothing(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1))
	c := connectWith(t, Config{Brokers: cluster.ListenAddrs(), readTimeout: 100 * time.Millisecond})
	log := c.PublicLog(topic(t, c, 1))
	spec := TopicSpec{Name: log.Topic(), Partitions: 1}
	appendAll(t, log, 0, numbered(0, 0, 1))
	for what, test := range map[kmsg.Key]func(ctx context.Context) error{
		kmsg.ListOffsets: func(ctx context.Context) error { _, err := log.End(ctx, 0); return err },
		kmsg.Metadata: func(ctx context.Context) error {
			addr, err := c.leader(ctx, log.Topic(), 0, false)
			if err != nil {
				return err
			}
			return c.sameTopic(ctx, addr, log.Topic())
		},
		kmsg.DescribeConfigs: func(ctx context.Context) error { return c.CheckTopics(ctx, []TopicSpec{spec}) },
		kmsg.OffsetFetch: func(ctx context.Context) error {
			_, _, err := c.GroupLag(ctx, "group", []string{log.Topic()})
			return err
		},
		kmsg.Produce: func(ctx context.Context) error { return log.AppendBatch(ctx, 0, numbered(0, 1, 1)) },
	} {
		t.Run(what.Name(), func(t *testing.T) {
			late := false
			cluster.ControlKey(int16(what), func(kmsg.Request) (kmsg.Response, error, bool) {
				cluster.KeepControl()
				if !late {
					late = true
					time.Sleep(300 * time.Millisecond) // the whole broker stands still
				}
				return nil, nil, false
			})
			var err error
			for tries := range 20 {
				if err = test(bounded(t)); err == nil {
					return
				}
				t.Logf("try %d: %v", tries, err)
			}
			t.Errorf("it never works again: %v", err)
		})
	}
}

// A connection that breaks costs the request that was on it, and no other.
func TestAFaultIsOneRequestsOwn(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1))
	c := connect(t, cluster.ListenAddrs())
	exists := topic(t, c, 1)
	var asked, failed atomic.Int32
	cluster.ControlKey(int16(kmsg.DescribeConfigs), func(kmsg.Request) (kmsg.Response, error, bool) {
		cluster.KeepControl()
		return nil, errors.New("cut"), asked.Add(1)%5 == 0
	})
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := c.CheckTopics(t.Context(), []TopicSpec{{Name: exists, Partitions: 1}}); err != nil {
				failed.Add(1)
				t.Log(err)
			}
		})
	}
	wg.Wait()
	if got, most := failed.Load(), asked.Load()/5; got > most || most == 0 {
		t.Errorf("%d of %d requests failed, where %d were to at most", got, asked.Load(), most)
	}
}

// Once connected, a client does not need the address that it started from: it may be gone, or not answer.
func TestTheAddressToStartFromMayGo(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1))
	door, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	open.Go(func() {
		for {
			in, err := door.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", cluster.ListenAddrs()[0])
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			conns = append(conns, in, out)
			mu.Unlock()
			for _, c := range [][2]net.Conn{{in, out}, {out, in}} {
				open.Go(func() { _, _ = io.Copy(c[0], c[1]) })
			}
		}
	})
	c := connectWith(t, Config{Brokers: []string{door.Addr().String()}, readTimeout: 10 * time.Second})
	spec := TopicSpec{Name: topic(t, c, 1), Partitions: 1}
	_ = door.Close()
	mu.Lock()
	for _, c := range conns {
		_ = c.Close()
	}
	mu.Unlock()
	open.Wait()
	ask := func(when string) {
		for range 5 {
			c.closeAdmins() // so that it takes new ones
			if err := c.CheckTopics(t.Context(), []TopicSpec{spec}); err != nil {
				t.Errorf("%s: %v", when, err)
			}
			if _, _, err := c.GroupLag(t.Context(), "group", []string{spec.Name}); err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
	}
	ask("gone")
	silent, err := net.Listen("tcp", door.Addr().String()) // it takes connections, and answers nothing
	if err != nil {
		t.Skip("somebody else has taken the port: ", err)
	}
	defer silent.Close()
	ask("silent")
}
