package journal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"wharf/commands"
	"wharf/domain"
)

// Config is what a Journal needs. The zero value of a field below "Optional" means its default.
type Config struct {
	Service    string // "orders": the events' source
	Topic      string // the public topic's name, for positions
	Partitions int
	Events     domain.Events // the service's vocabulary
	Log        Log
	Public     PublicLog

	// Optional.
	Now      func() time.Time    // the time of events; time.Now
	NewID    func() uuid.UUID    // ids of commits and events, UUIDv7
	Jitter   func(n int64) int64 // a random number below n
	MaxCalls int                 // calls of Handle that may wait at a time, per partition; beyond: ErrNotReady
	Logger   *slog.Logger
}

const (
	maxGroupBytes = 512 << 10
	maxAttempts   = 10 // proposals that may lose before a command is refused with ErrConflict
	resendDelay   = 50 * time.Millisecond
)

// Journal is one replica's view of a service's journal. It implements commands.Journal. Handle answers only while
// Run is running.
type Journal[S commands.State[S]] struct {
	Config
	partitions []*partition[S]
	life       context.Context // of Run, for what outlives a call: sends and barriers
	started    chan struct{}
}

func init() {
	uuid.EnableRandPool() // ids are made for every commit and every event
}

// New makes a journal that has read nothing yet.
func New[S commands.State[S]](c Config) *Journal[S] {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.NewID == nil {
		c.NewID = func() uuid.UUID { return uuid.Must(uuid.NewV7()) }
	}
	if c.Jitter == nil {
		c.Jitter = rand.Int64N
	}
	if c.MaxCalls == 0 {
		c.MaxCalls = 10_000
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	c.Logger = c.Logger.With("topic", c.Service+".journal")
	j := &Journal[S]{Config: c, started: make(chan struct{})}
	for p := range c.Partitions {
		j.partitions = append(j.partitions, newPartition(j, int32(p)))
	}
	return j
}

// Run folds every partition of the log, from its start and as it grows, until ctx ends. It returns early only when
// the log itself is unusable (a partition no longer has its start).
func (j *Journal[S]) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	j.life = ctx
	close(j.started)
	for _, p := range j.partitions {
		group.Go(func() error {
			if err := p.run(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("journal of %s, partition %d: %w", j.Service, p.number, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// Ready is nil when every partition has been read up to what was its end when Run began; otherwise it says what is
// missing. A partition that has halted is no reason to turn the others' commands away: see Halted.
func (j *Journal[S]) Ready() error {
	behind := 0
	for _, p := range j.partitions {
		ready, halted := p.state()
		if !ready && halted == nil {
			behind++
		}
	}
	if behind > 0 {
		return fmt.Errorf("reading the journal of %s: %d of %d partitions are behind", j.Service, behind, j.Partitions)
	}
	return nil
}

// Halted is nil, or says on which records partitions have halted, because a newer program wrote them. Their commands
// get ErrNotReady.
func (j *Journal[S]) Halted() error {
	var all []error
	for _, p := range j.partitions {
		if _, halted := p.state(); halted != nil {
			all = append(all, halted)
		}
	}
	return errors.Join(all...)
}

func (j *Journal[S]) partition(stream string) *partition[S] {
	return j.partitions[Partition([]byte(stream), j.Partitions)]
}

// Handle implements commands.Journal.
func (j *Journal[S]) Handle(ctx context.Context, c commands.Command, decide commands.Decision[S]) (commands.Receipt, error) {
	run, err := j.handle(ctx, []commands.Command{c}, []commands.Decision[S]{decide})
	if err != nil {
		return commands.Receipt{}, err
	}
	answer := run.calls[0].reply
	return answer.receipt, answer.err
}

// HandleInOrder implements commands.Journal.
func (j *Journal[S]) HandleInOrder(ctx context.Context, cs []commands.Command, ds []commands.Decision[S]) (int, error) {
	run, err := j.handle(ctx, cs, ds)
	if err != nil {
		return 0, err
	}
	for i, c := range run.calls {
		if err := c.reply.err; err != nil && !isRefusal(err) {
			return i, err
		}
	}
	return len(run.calls), nil
}

func (j *Journal[S]) handle(ctx context.Context, cs []commands.Command, ds []commands.Decision[S]) (*run[S], error) {
	select {
	case <-j.started:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: the journal is starting", commands.ErrNotReady)
	}
	if len(cs) == 0 || cs[0].Stream == "" {
		return nil, errors.New("a command without a stream")
	}
	return j.partition(cs[0].Stream).handle(ctx, cs, ds)
}

// Watch implements commands.Journal.
func (j *Journal[S]) Watch(ctx context.Context, partition int32, f func(stream string, state S, at domain.Position)) {
	j.partitions[partition].watch(ctx, f)
}
