package journal

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Memory is a topic in memory: the reference Log and PublicLog, which tests run on and which the conformance suite
// holds every other one against. The zero value is not usable; make one with NewMemory.
type Memory struct {
	mu         sync.Mutex
	partitions [][]Record
	grown      chan struct{} // closed, and made anew, when a partition grows
}

// NewMemory makes an empty topic.
func NewMemory(partitions int) *Memory {
	return &Memory{partitions: make([][]Record, partitions), grown: make(chan struct{})}
}

// Append implements Log. It never refuses.
func (m *Memory) Append(ctx context.Context, r Record) error {
	return m.AppendBatch(ctx, r.Partition, []Record{r})
}

// AppendBatch implements PublicLog.
func (m *Memory) AppendBatch(ctx context.Context, partition int32, records []Record) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range records {
		r.Partition, r.Offset, r.Time = partition, int64(len(m.partitions[partition])), time.Now()
		m.partitions[partition] = append(m.partitions[partition], r)
	}
	close(m.grown)
	m.grown = make(chan struct{})
	return nil
}

// Read implements Reader.
func (m *Memory) Read(ctx context.Context, partition int32, from int64, f func(Batch) error) error {
	for {
		m.mu.Lock()
		end := int64(len(m.partitions[partition]))
		records, grown := slices.Clone(m.partitions[partition][min(from, end):]), m.grown
		m.mu.Unlock()
		if from > end {
			return fmt.Errorf("offset %d is out of range: partition %d ends at %d", from, partition, end)
		}
		if len(records) > 0 {
			from += int64(len(records))
			if err := f(Batch{Records: records, Next: from}); err != nil {
				return err
			}
			continue
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// End implements Reader.
func (m *Memory) End(ctx context.Context, partition int32) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int64(len(m.partitions[partition])), ctx.Err()
}
