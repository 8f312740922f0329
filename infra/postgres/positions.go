package postgres

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/projections"
)

// Positions tells queries how far the live read models are. It implements projections.Positions. However many wait, one
// question after the other is asked of the database, and none while nobody waits.
type Positions struct {
	TopicIDs map[string]string // of the topics that there are: what a build has of others is nothing; optional

	pool querier

	mu      sync.Mutex
	seen    map[seenAt]reached // as of asked
	asked   time.Time
	waiting map[*waiter]struct{}
	joined  time.Time // when the last one came to wait
	asking  bool

	older time.Time // when the views were last seen to be an older projector's; only the one who asks looks at it
}

// fresh is for how long an answer of the database is taken for the present: it may lose what it has not flushed, or be made
// anew.
const fresh = 100 * time.Millisecond

// longestPause is between two questions while somebody waits and answers come.
const longestPause = 5 * time.Millisecond

// olderFor is for how long views are taken for those of an older projector.
const olderFor = 5 * time.Second

// leastLook is how long an answer of the database is waited for at least: who comes while it is asked waits for two.
const leastLook = 2 * time.Second

// NewPositions reads from the pool, which may be one for queries.
func NewPositions(pool querier) *Positions {
	return &Positions{pool: pool, waiting: map[*waiter]struct{}{}}
}

// seenAt is a partition as a read model sees it.
type seenAt struct {
	model, topic string
	partition    int32
}

// reached is how far it has come there.
type reached struct {
	seq    int64
	halted bool
}

type waiter struct {
	seenAt
	seq    int64
	done   chan struct{} // closed when it is there
	looked chan struct{} // closed when it has been looked at once
	once   bool
	seen   reached
	err    error // of the last question
}

// Wait implements projections.Positions.
func (p *Positions) Wait(ctx context.Context, model string, at domain.Position, most time.Duration) error {
	w := &waiter{seenAt: seenAt{model, at.Topic, at.Partition}, seq: at.Seq, done: make(chan struct{}), looked: make(chan struct{})}
	p.mu.Lock()
	if p.seen[w.seenAt].seq >= w.seq && time.Since(p.asked) < fresh {
		p.mu.Unlock()
		return nil
	}
	p.waiting[w], p.joined = struct{}{}, time.Now()
	if !p.asking {
		p.asking = true
		go p.ask()
	}
	p.mu.Unlock()
	select {
	case <-w.done:
	case <-time.After(most):
	case <-ctx.Done():
	}
	select {
	case <-w.looked: // once, however short the wait was to be
	case <-time.After(leastLook - most):
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.waiting, w)
	select {
	case <-w.done:
		return nil
	default:
		if !w.once {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("read the positions: the database does not answer: %w", context.DeadlineExceeded)
		}
		if w.err != nil {
			return w.err
		}
		return &projections.BehindError{Model: model, Wanted: at, Seen: w.seen.seq, Halted: w.seen.halted}
	}
}

// ask goes on for as long as anybody waits.
func (p *Positions) ask() {
	for {
		p.mu.Lock()
		if len(p.waiting) == 0 {
			p.asking = false
			p.mu.Unlock()
			return
		}
		var models []string
		asked := make([]*waiter, 0, len(p.waiting))
		for w := range p.waiting {
			asked = append(asked, w)
			if !slices.Contains(models, w.model) {
				models = append(models, w.model)
			}
		}
		p.mu.Unlock()
		began := time.Now()
		now, err := p.read(models)
		p.mu.Lock()
		if err == nil {
			p.seen, p.asked = now, began
		}
		for _, w := range asked {
			w.seen, w.err = now[w.seenAt], err
			if _, waits := p.waiting[w]; waits && w.seen.seq >= w.seq {
				delete(p.waiting, w)
				close(w.done)
			}
			if !w.once {
				w.once = true
				close(w.looked)
			}
		}
		// A quarter of what the answer took, which leaves some of the database to others; and when all have waited for long, they can
		// wait for an eighth more.
		rest := time.Since(began) / 4
		if len(p.waiting) > 0 {
			rest = max(rest, time.Since(p.joined)/8)
		}
		p.mu.Unlock()
		rest = min(rest, longestPause) // whatever was late
		if err != nil {
			rest = fresh
		}
		time.Sleep(rest)
	}
}

func (p *Positions) read(models []string) (map[seenAt]reached, error) {
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	ids := "topic_ids"
	if time.Since(p.older) < olderFor {
		ids = "'{}'::text[]"
	}
	rows, err := p.pool.Query(ctx, "SELECT model, topics, "+ids+", partition, seqs, error <> '' FROM wharf_read.builds WHERE state = 'live' AND model = ANY($1)", models)
	now := map[seenAt]reached{}
	if err == nil {
		var b build
		var at seenAt
		var seqs []int64
		var halted bool
		_, err = pgx.ForEachRow(rows, []any{&at.model, &b.topics, &b.topicIDs, &at.partition, &seqs, &halted}, func() error {
			for i, topic := range b.topics {
				if at.topic = topic; b.isOther(i, p.TopicIDs) {
					now[at] = reached{0, true}
				} else {
					now[at] = reached{seqs[i], halted}
				}
			}
			return nil
		})
	}
	if isCode(err, codeUndefinedColumn) && time.Since(p.older) >= olderFor {
		p.older = time.Now()
		return p.read(models)
	}
	if err != nil {
		return nil, fmt.Errorf("read the positions: %w", err)
	}
	return now, nil
}
