// Package kafka answers the question "how does the shop speak to Kafka?". All of Sarama and of Watermill's Kafka
// adapter is in here; the rest of the program sees journal.Log, journal.PublicLog and Watermill's interfaces.
//
// Read this file first (the settings that make a Kafka client safe for an event store), then log.go (how records are
// written), reader.go and fetch.go (how they are read), subscriber.go (how policies get their events) on top of
// group.go (who owns which partition). topics.go makes topics and finds wrong ones; publisher.go is Watermill's
// Publisher for public events.
//
// Where an adapter or a client library cannot give what the journal protocol needs, this package speaks the protocol
// itself, by Sarama's requests on connections of its own: fetching (the position after control records, no silent
// jump after OFFSET_OUT_OF_RANGE), offsets asked of the leader, and atomic record batches.
package kafka

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/IBM/sarama"
	"github.com/ThreeDotsLabs/watermill"
	wkafka "github.com/ThreeDotsLabs/watermill-kafka/v3/pkg/kafka"
	"github.com/rcrowley/go-metrics"
)

// Sizes, in bytes.
const (
	// MaxRecordBytes is the size (of key, value and headers) up to which every record can be appended: an order of 2,000
	// lines fits, whatever its SKUs are.
	MaxRecordBytes = 2 << 20
	// maxBatchBytes bounds what the producer puts into one record batch: one record of the largest size fits with its
	// envelope, and a batch of many never exceeds what the topics accept, or one would be refused for another's sake.
	maxBatchBytes = MaxRecordBytes + 64<<10
	// topicMessageBytes is the max.message.bytes of created topics, minTopicMessageBytes the least that will do.
	topicMessageBytes    = 4 << 20
	minTopicMessageBytes = MaxRecordBytes + 128<<10
)

// Times.
const (
	retryBackoff     = 50 * time.Millisecond // first pause between tries
	retryBackoffMax  = time.Second
	readTimeout      = 15 * time.Second // longer than anything that a broker may hold back an answer for
	rebalanceTimeout = 10 * time.Second // how long a member may take to let go of its partitions
)

// ErrClosed is the error of everything that is asked of a closed Client.
var ErrClosed = errors.New("the Kafka client is closed")

// ErrNoBroker is the error of Connect when no broker answers.
var ErrNoBroker = errors.New("no Kafka broker answers")

// Config says where Kafka is and how to be a member of a group. Brokers is required.
type Config struct {
	Brokers  []string     // host:port of some brokers of the cluster
	ClientID string       // shown in the brokers' logs; default "wharf"
	Logger   *slog.Logger // default slog.Default()

	ConnectTimeout time.Duration // how long Connect tries; default 10 s
	SessionTimeout time.Duration // after which a silent group member is given up, if the brokers allow it, or else a multiple; default 10 s
	Heartbeat      time.Duration // of a group member, and so how fast it notices a rebalance; default 1 s

	readTimeout time.Duration // of tests whose brokers do not answer, and that join no group
}

// Client is a connection to one Kafka cluster. All its methods may be called from any goroutine.
type Client struct {
	cfg    Config
	conf   *sarama.Config
	log    *slog.Logger
	sarama sarama.Client
	pub    *wkafka.Publisher

	// Goroutines of this package end when ctx does; Close waits for them.
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex
	closed  bool
	wg      sync.WaitGroup // entered only under mu while not closed
	readers map[string]*Reader
	conns   map[string]*sarama.Broker      // by address and purpose
	ends    map[string]*gatherer[endAsk]   // by address
	batches map[string]*gatherer[batchAsk] // by address and share of the partitions
	known   map[string]identity            // by topic
	admins  []sarama.ClusterAdmin          // that are idle
}

func init() {
	// Nobody reads Sarama's metrics, and they cost a goroutine and a dozen samples a request.
	metrics.UseNilMetrics = true
}

// Connect returns a Client once a broker has answered. When none does in Config.ConnectTimeout it is an ErrNoBroker that
// names the brokers.
func Connect(ctx context.Context, cfg Config) (*Client, error) {
	if len(cfg.Brokers) == 0 {
		return nil, errors.New("connect to Kafka: no brokers given")
	}
	cfg.ClientID = or(cfg.ClientID, "wharf")
	cfg.Logger = or(cfg.Logger, slog.Default())
	cfg.ConnectTimeout = or(cfg.ConnectTimeout, 10*time.Second)
	cfg.SessionTimeout = or(cfg.SessionTimeout, 10*time.Second)
	cfg.Heartbeat = or(cfg.Heartbeat, time.Second)
	cfg.readTimeout = or(cfg.readTimeout, readTimeout)
	conf := saramaConfig(cfg)
	if err := conf.Validate(); err != nil {
		return nil, fmt.Errorf("connect to Kafka: %w", err)
	}
	ctx, done := context.WithTimeout(ctx, cfg.ConnectTimeout)
	defer done()
	cl, err := dial(ctx, cfg.Brokers, conf)
	if err != nil {
		return nil, err
	}
	pub, err := wkafka.NewPublisher(wkafka.PublisherConfig{
		Brokers: cfg.Brokers, Marshaler: marshaler{}, OverwriteSaramaConfig: conf,
	}, watermill.NopLogger{})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to Kafka: %w", err), cl.Close())
	}
	c := &Client{
		cfg: cfg, conf: conf, log: cfg.Logger, sarama: cl, pub: pub,
		readers: map[string]*Reader{}, conns: map[string]*sarama.Broker{},
		ends: map[string]*gatherer[endAsk]{}, batches: map[string]*gatherer[batchAsk]{},
		known: map[string]identity{},
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c, nil
}

// dial is a Sarama client that has seen the cluster's metadata. It tries until ctx ends.
func dial(ctx context.Context, brokers []string, conf *sarama.Config) (sarama.Client, error) {
	type result struct {
		cl  sarama.Client
		err error
	}
	last := errors.New("no answer")
	for retry := (backoff{}); ; {
		got := make(chan result, 1)
		go func() {
			cl, err := sarama.NewClient(brokers, conf)
			if err == nil && ctx.Err() != nil { // nobody waits for it any more
				err = errors.Join(ctx.Err(), cl.Close())
			}
			got <- result{cl, err}
		}()
		select {
		case r := <-got:
			if r.err == nil {
				return r.cl, nil
			}
			last = r.err
		case <-ctx.Done():
		}
		if !retry.sleep(ctx) {
			return nil, fmt.Errorf("%w at %s: %w", ErrNoBroker, strings.Join(brokers, ", "), last)
		}
	}
}

// Close ends all reading, lets appends that are under way come to their end, and closes the connections. Groups and
// subscriptions must have been ended before.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	readers := slices.Collect(maps.Values(c.readers))
	c.mu.Unlock()
	c.cancel()
	for _, r := range readers {
		r.wakeLanes()
	}
	c.wg.Wait()
	for _, b := range c.conns {
		_ = b.Close() // ErrNotConnected, or nothing that could be done about it
	}
	c.closeAdmins()
	if err := errors.Join(c.pub.Close(), c.sarama.Close()); err != nil {
		return fmt.Errorf("close the Kafka client: %w", err)
	}
	return nil
}

// enter counts a goroutine that Close has to wait for; it is false when the client is closed.
func (c *Client) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.wg.Add(1)
	}
	return !c.closed
}

// do runs f, which knows no context, and returns when it does or ctx ends; f then goes on in the background.
func (c *Client) do(ctx context.Context, f func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !c.enter() {
		return ErrClosed
	}
	done := make(chan error, 1)
	go func() {
		defer c.wg.Done()
		done <- f()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leader is the address of the broker that leads the partition.
func (c *Client) leader(ctx context.Context, topic string, partition int32, refresh bool) (addr string, err error) {
	var b *sarama.Broker
	err = c.do(ctx, func() (err error) {
		if refresh {
			if err = c.sarama.RefreshMetadata(topic); err != nil {
				return err
			}
		}
		b, err = c.sarama.Leader(topic, partition)
		return err
	})
	if err != nil {
		return "", err
	}
	return b.Addr(), nil
}

// conn is this client's connection to the broker for one purpose, so that no request waits behind one that may take
// its time (a connection serves one request after the other). Connecting goes on in the background.
func (c *Client) conn(addr, purpose string) *sarama.Broker {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.conns[purpose+"@"+addr]
	if b == nil {
		b = sarama.NewBroker(addr)
		c.conns[purpose+"@"+addr] = b
	}
	_ = b.Open(c.conf) // it is open already, or the request that follows tells what is wrong
	return b
}

// discard closes a connection that has failed. Sarama leaves one whose answer came too late as it is: open, and good for
// nothing, because every later answer is taken for that of another request.
func (c *Client) discard(b *sarama.Broker, purpose string) {
	c.mu.Lock()
	if name := purpose + "@" + b.Addr(); c.conns[name] == b {
		delete(c.conns, name)
	}
	c.mu.Unlock()
	_ = b.Close() // ErrNotConnected, or nothing that could be done about it
}

// saramaConfig is a configuration that is safe for a log: Sarama's defaults lose, reorder and duplicate.
func saramaConfig(cfg Config) *sarama.Config {
	c := sarama.NewConfig()
	c.ClientID = cfg.ClientID
	c.Version = sarama.V3_6_0_0
	c.ChannelBufferSize = 1024

	c.Net.MaxOpenRequests = 1
	c.Net.DialTimeout = 3 * time.Second
	c.Net.ReadTimeout = cfg.readTimeout
	c.Net.WriteTimeout = cfg.readTimeout

	c.Metadata.AllowAutoTopicCreation = false // a topic made by accident has the wrong settings
	c.Metadata.Retry.Max = 3
	c.Metadata.Retry.Backoff = retryBackoff
	c.Metadata.RefreshFrequency = time.Minute
	c.Metadata.Timeout = 5 * time.Second

	c.Producer.RequiredAcks = sarama.WaitForAll
	c.Producer.Idempotent = true
	c.Producer.Retry.Max = 10
	c.Producer.Retry.Backoff = retryBackoff
	c.Producer.Timeout = 10 * time.Second
	c.Producer.MaxMessageBytes = maxBatchBytes
	c.Producer.Partitioner = sarama.NewManualPartitioner // a record carries its partition
	c.Producer.Return.Successes = true
	c.Producer.Return.Errors = true

	c.Consumer.Offsets.Initial = sarama.OffsetOldest
	c.Consumer.Offsets.AutoCommit.Enable = false // committed by hand, with metadata
	c.Consumer.Return.Errors = true
	c.Consumer.Group.ResetInvalidOffsets = false
	c.Consumer.Group.Session.Timeout = cfg.SessionTimeout
	c.Consumer.Group.Heartbeat.Interval = cfg.Heartbeat
	c.Consumer.Group.Rebalance.Timeout = rebalanceTimeout
	c.Consumer.Group.Rebalance.Retry.Backoff = 200 * time.Millisecond
	// Eager and by range: a member lets go of everything before anything is given to another, and gets the same
	// partition numbers of every topic.
	c.Consumer.Group.Rebalance.GroupStrategies = []sarama.BalanceStrategy{sarama.NewBalanceStrategyRange()}
	return c
}

// backoff makes the pauses between tries: doubling, capped, with jitter.
type backoff struct{ tries int }

func (b *backoff) next() time.Duration {
	d := min(retryBackoff<<min(b.tries, 10), retryBackoffMax)
	b.tries++
	return d/2 + rand.N(d/2)
}

// sleep is false when ctx has ended.
func (b *backoff) sleep(ctx context.Context) bool {
	t := time.NewTimer(b.next())
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// or is v, or the default when v is the zero value.
func or[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}
