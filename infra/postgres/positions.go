package postgres

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/projections"
)

// Positions tells queries how far the live read models are. It implements projections.Positions. However many wait, one
// question after the other is asked of the database, and none while nobody waits.
type Positions struct {
	pool querier
	look time.Duration // between two questions

	mu      sync.Mutex
	seen    map[seenAt]int64
	waiting map[*waiter]struct{}
	asking  bool
}

// NewPositions reads from the pool, which may be one for queries.
func NewPositions(pool querier) *Positions {
	return &Positions{pool: pool, look: 5 * time.Millisecond, seen: map[seenAt]int64{}, waiting: map[*waiter]struct{}{}}
}

// seenAt is a partition as a read model sees it.
type seenAt struct {
	model, topic string
	partition    int32
}

type waiter struct {
	seenAt
	seq  int64
	done chan struct{}
}

// Wait implements projections.Positions.
func (p *Positions) Wait(ctx context.Context, model string, at domain.Position) error {
	w := &waiter{seenAt{model, at.Topic, at.Partition}, at.Seq, make(chan struct{})}
	p.mu.Lock()
	if p.seen[w.seenAt] >= w.seq { // a swap never goes back
		p.mu.Unlock()
		return nil
	}
	p.waiting[w] = struct{}{}
	if !p.asking {
		p.asking = true
		go p.ask()
	}
	p.mu.Unlock()
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.waiting, w)
	if p.seen[w.seenAt] >= w.seq {
		return nil
	}
	return &projections.BehindError{Model: model, Wanted: at, Seen: p.seen[w.seenAt]}
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
		models := map[string]bool{}
		var names []string
		for w := range p.waiting {
			if !models[w.model] {
				models[w.model] = true
				names = append(names, w.model)
			}
		}
		p.mu.Unlock()
		now, err := p.read(names)
		p.mu.Lock()
		if err == nil {
			for at, seq := range now {
				p.seen[at] = max(p.seen[at], seq)
			}
		}
		for w := range p.waiting {
			if p.seen[w.seenAt] >= w.seq {
				delete(p.waiting, w)
				close(w.done)
			}
		}
		p.mu.Unlock()
		time.Sleep(p.look)
	}
}

func (p *Positions) read(models []string) (map[seenAt]int64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	rows, err := p.pool.Query(ctx, "SELECT model, topics, partition, seqs FROM wharf_read.builds WHERE state = 'live' AND model = ANY($1)", models)
	if err != nil {
		return nil, fmt.Errorf("read the positions: %w", err)
	}
	now := map[seenAt]int64{}
	var at seenAt
	var topics []string
	var seqs []int64
	_, err = pgx.ForEachRow(rows, []any{&at.model, &topics, &at.partition, &seqs}, func() error {
		for i, topic := range topics {
			at.topic = topic
			now[at] = seqs[i]
		}
		return nil
	})
	return now, err
}
