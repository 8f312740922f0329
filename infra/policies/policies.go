// Package policies answers the question "how does an event of one service become a command of another?". It runs a
// service's table (commands/choreography.go) in Watermill's Router: an event is handed out once for each stream that
// it concerns, in order per stream, and is done when the journal is certain of the outcome.
package policies

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
	"wharf/infra/kafka"
)

// Config is what the policies of one service need.
type Config[S any] struct {
	Service  string // also names the consumer group, see Group
	Topics   []string
	Journal  commands.Journal[S]
	Policies commands.Policies[S]
	// Owned runs for each partition that this replica owns. caughtUp waits until the policies have handled all that
	// was there when it was called.
	Owned  func(ctx context.Context, partition int32, caughtUp func(context.Context) error)
	Logger *slog.Logger
}

// Group is the consumer group of the service's policies. Whoever owns a partition in it also publishes the
// partition's events.
func Group(service string) string { return service + ".policies" }

const (
	handleTimeout = 30 * time.Second
	maxBatch      = 128 // events for one stream that are handled together, if so many wait
)

// Runner runs the policies of one service.
type Runner[S any] struct {
	Config[S]
	subscriber *kafka.Subscriber
	cache      cache[S]
}

// New makes a runner that has not joined its group yet.
func New[S any](client *kafka.Client, c Config[S]) *Runner[S] {
	r := &Runner[S]{Config: c}
	r.subscriber = kafka.NewSubscriber(client, kafka.SubscriberConfig{
		Group: Group(c.Service), Targets: r.targets, Admit: admit, Owned: c.Owned, Batch: maxBatch,
	})
	return r
}

// Halted is nil, or says which source partition is not read any more, because an event is missing from it.
func (r *Runner[S]) Halted() error { return r.subscriber.Halted() }

// Run handles events until ctx ends.
func (r *Runner[S]) Run(ctx context.Context) error {
	logger := watermill.NewSlogLoggerWithLevelMapping(r.Logger, map[slog.Level]slog.Level{slog.LevelInfo: slog.LevelDebug})
	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: 10 * time.Second}, logger)
	if err != nil {
		return fmt.Errorf("make the router: %w", err)
	}
	router.AddMiddleware(
		middleware.CorrelationID,
		middleware.Retry{MaxRetries: 2, InitialInterval: 20 * time.Millisecond, Multiplier: 2,
			ShouldRetry: func(p middleware.RetryParams) bool { return errors.Is(p.Err, commands.ErrConflict) },
		}.Middleware,
		middleware.Recoverer,
	)
	router.AddConsumerHandler(r.Service+"-policies", strings.Join(r.Topics, ","), r.subscriber, r.handle)
	if err := router.Run(ctx); err != nil {
		return fmt.Errorf("run the policies of %s: %w", r.Service, err)
	}
	return r.subscriber.Close()
}

// admit is the consumer rule: see journal.Next.
func admit(topic string, record journal.Record, last int64) (int64, bool, error) {
	e, ok := journal.ParseEvent(topic, record)
	if !ok {
		return last, false, nil
	}
	process, err := journal.Next(last, e)
	if err != nil || !process {
		return last, false, err
	}
	return e.Seq, true, nil
}

// targets is the streams that the event concerns. Whom one concerns that cannot be decoded is not known, so nothing that
// comes after it in its partition may be handled: for a stream that both concern, it would make the one that was passed
// over look like a repetition for ever. A program that can decode it goes on from there.
func (r *Runner[S]) targets(msg *message.Message) ([]string, error) {
	e, err := r.entry(kafka.RecordOf(msg))
	if err != nil {
		return nil, fmt.Errorf("%w: start a program that can tell whom it concerns", err)
	}
	return e.streams, nil
}

// handle lets the journal decide the events' reactions on one stream. A refusal is an answer; everything else that is
// no certain outcome is not, and the events come again.
func (r *Runner[S]) handle(msg *message.Message) error {
	topic, records := kafka.RecordsOf(msg)
	stream := kafka.TargetOf(msg)
	cmds := make([]commands.Command, len(records))
	decisions := make([]commands.Decision[S], len(records))
	for i, record := range records {
		e, err := r.entry(topic, record)
		if err != nil {
			return err
		}
		decide, ok := e.decide[stream]
		if !ok {
			return fmt.Errorf("event %s has no reaction on %q", e.event.Position, stream)
		}
		cmds[i] = commands.Command{Stream: stream, IfMatch: commands.AnyVersion, Trace: e.event.Trace,
			Cause: e.event.Position, Group: Group(r.Service)}
		decisions[i] = decide
	}
	ctx, cancel := context.WithTimeout(msg.Context(), handleTimeout)
	defer cancel()
	n, err := r.Journal.HandleInOrder(ctx, cmds, decisions)
	if err != nil {
		return fmt.Errorf("%s on %s: %w", cmds[n].Cause, stream, err)
	}
	for _, record := range records {
		r.cache.done(place{topic, record.Partition, record.Offset})
	}
	return nil
}

// entry is an event with its reactions. Decoding an order of 2,000 lines once for each of its SKUs would be a waste,
// so they are kept until all are done.
type entry[S any] struct {
	event   domain.Recorded
	streams []string
	decide  map[string]commands.Decision[S]
	left    int
}

func (r *Runner[S]) entry(topic string, record journal.Record) (*entry[S], error) {
	return r.cache.get(place{topic, record.Partition, record.Offset}, func() (*entry[S], error) {
		event, ok := journal.ParseEvent(topic, record)
		if !ok {
			return nil, fmt.Errorf("record %s/%d/%d is no event", topic, record.Partition, record.Offset)
		}
		reactions, err := r.Policies.React(event)
		if err != nil {
			return nil, fmt.Errorf("event %s: %w", event.Position, err)
		}
		e := &entry[S]{event: event, decide: make(map[string]commands.Decision[S], len(reactions)), left: len(reactions)}
		for _, reaction := range reactions {
			e.streams = append(e.streams, reaction.Stream)
			e.decide[reaction.Stream] = reaction.Decide
		}
		return e, nil
	})
}

type place struct {
	topic     string
	partition int32
	offset    int64
}

// cache forgets an event when all its reactions are done, and everything when it has grown too large: what is
// forgotten is decoded again.
type cache[S any] struct {
	mu      sync.Mutex
	entries map[place]*entry[S]
	size    int // reactions in all entries
}

const maxCached = 200_000 // reactions

func (c *cache[S]) get(p place, decode func() (*entry[S], error)) (*entry[S], error) {
	c.mu.Lock()
	e := c.entries[p]
	c.mu.Unlock()
	if e != nil {
		return e, nil
	}
	e, err := decode()
	if err != nil || e.left == 0 {
		return e, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries == nil || c.size >= maxCached {
		c.entries, c.size = map[place]*entry[S]{}, 0
	}
	if c.entries[p] == nil {
		c.size += len(e.streams)
	}
	c.entries[p] = e
	return e, nil
}

func (c *cache[S]) done(p place) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[p]; e != nil {
		if e.left--; e.left <= 0 {
			delete(c.entries, p)
			c.size -= len(e.streams)
		}
	}
}
