package kafka

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/ThreeDotsLabs/watermill/message"

	"wharf/infra/journal"
)

// PartitionKey is the metadata that holds a message's key, unless PublisherConfig says otherwise.
const PartitionKey = "partition_key"

// What a Publisher puts into one record batch at most.
const (
	chunkRecords = 500
	chunkBytes   = 512 << 10
)

// PublisherConfig says where messages go. The zero value will do.
type PublisherConfig struct {
	// Key is the key of the record that a message becomes, which decides the partition. Default: the metadata
	// PartitionKey, or else the UUID.
	Key func(topic string, msg *message.Message) string
}

// Publisher is a Watermill message.Publisher that sends many messages in few requests.
type Publisher struct {
	c      *Client
	cfg    PublisherConfig
	ctx    context.Context
	cancel context.CancelFunc
}

// NewPublisher returns a Publisher on the client's connections.
func NewPublisher(c *Client, cfg PublisherConfig) *Publisher {
	if cfg.Key == nil {
		cfg.Key = func(_ string, msg *message.Message) string { return or(msg.Metadata[PartitionKey], msg.UUID) }
	}
	p := &Publisher{c: c, cfg: cfg}
	p.ctx, p.cancel = context.WithCancel(c.ctx)
	return p
}

// Publish appends the messages, those of one partition in their order. It returns when all are durable, or with an
// error that leaves open which ones are: of each partition's messages the first so many, and perhaps more to come.
func (p *Publisher) Publish(topic string, msgs ...*message.Message) error {
	if err := p.publish(topic, msgs); err != nil {
		return fmt.Errorf("publish %d messages to %s: %w", len(msgs), topic, err)
	}
	return nil
}

func (p *Publisher) publish(topic string, msgs []*message.Message) error {
	if p.ctx.Err() != nil {
		return errors.New("the publisher is closed")
	}
	partitions, err := p.c.sarama.Partitions(topic)
	if err != nil {
		return err
	}
	byPartition := map[int32][]journal.Record{}
	for _, msg := range msgs {
		key := []byte(p.cfg.Key(topic, msg))
		r := journal.Record{
			Partition: journal.Partition(key, len(partitions)), Key: key, Value: msg.Payload,
			Headers: []journal.Header{{Key: uuidHeader, Value: []byte(msg.UUID)}},
		}
		for _, name := range slices.Sorted(maps.Keys(msg.Metadata)) {
			r.Headers = append(r.Headers, journal.Header{Key: name, Value: []byte(msg.Metadata[name])})
		}
		byPartition[r.Partition] = append(byPartition[r.Partition], r)
	}
	log := p.c.PublicLog(topic)
	errs := make(chan error, len(byPartition))
	var wg sync.WaitGroup
	for partition, records := range byPartition {
		wg.Go(func() {
			for len(records) > 0 {
				n := chunk(records)
				if err := log.AppendBatch(p.ctx, partition, records[:n]); err != nil {
					errs <- err
					return
				}
				records = records[n:]
			}
		})
	}
	wg.Wait()
	close(errs)
	var all []error
	for err := range errs {
		all = append(all, err)
	}
	return errors.Join(all...)
}

// chunk is how many of the records go into the next batch: at least one.
func chunk(records []journal.Record) int {
	bytes := 0
	for i, r := range records {
		if bytes += size(r); i > 0 && (bytes > chunkBytes || i == chunkRecords) {
			return i
		}
	}
	return len(records)
}

// Close makes Publish fail from now on. What Publish has returned from is durable already.
func (p *Publisher) Close() error {
	p.cancel()
	return nil
}
