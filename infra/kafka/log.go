package kafka

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/IBM/sarama"

	"wharf/infra/journal"
)

// Log is a service's journal topic. It is a journal.Log.
type Log struct{ *Reader }

// Log is the journal topic of that name.
func (c *Client) Log(topic string) *Log { return &Log{c.Reader(topic)} }

// Append publishes the record through Watermill's Publisher; appends of many goroutines travel together. It returns
// when the publisher has an answer, or has given up: the end of ctx keeps it only from beginning.
func (l *Log) Append(ctx context.Context, r journal.Record) error {
	err := ctx.Err()
	if err == nil {
		err = l.publish(r)
	}
	if err != nil {
		return fmt.Errorf("append to %s partition %d: %w", l.topic, r.Partition, refused(err))
	}
	return nil
}

func (l *Log) publish(r journal.Record) error {
	if !l.c.enter() {
		return ErrClosed
	}
	defer l.c.wg.Done()
	return l.c.pub.Publish(l.topic, newCommitMessage(r))
}

// refused marks the errors that no repetition can cure.
func refused(err error) error {
	for _, final := range []error{
		sarama.ErrMessageSizeTooLarge, sarama.ErrMessageSetSizeTooLarge,
		sarama.ErrTopicAuthorizationFailed, sarama.ErrClusterAuthorizationFailed,
	} {
		if errors.Is(err, final) {
			return fmt.Errorf("%w: %w", journal.ErrRefused, err)
		}
	}
	var tooLarge sarama.ConfigurationError // is what Sarama calls a message that it does not even send
	if errors.As(err, &tooLarge) {
		return fmt.Errorf("%w: %w", journal.ErrRefused, err)
	}
	return err
}

// PublicLog is a service's public topic. It is a journal.PublicLog.
type PublicLog struct{ *Reader }

// PublicLog is the public topic of that name.
func (c *Client) PublicLog(topic string) *PublicLog { return &PublicLog{c.Reader(topic)} }

// produceConns is how many connections to a broker share the batches, by partition. The slowest partition of a request
// holds its answer back.
const produceConns = 2

// AppendBatch publishes the records as one atomic record batch. The time of a record is that of its ce_time header, if
// it has one that is not in the future (which brokers refuse), or else now. While it is certain that nothing was
// written (no leader, no connection), it is tried again, a bounded number of times. When ctx ends first its error is
// returned, and the batch is still being sent. A topic that was made anew gets nothing: *MadeAnewError.
func (l *PublicLog) AppendBatch(ctx context.Context, partition int32, records []journal.Record) error {
	if len(records) == 0 {
		return nil
	}
	batch := newBatch(records, time.Now())
	for retry := (backoff{}); ; {
		written, err := l.produce(ctx, partition, batch, retry.tries > 0)
		if err == nil {
			return nil
		}
		err = refused(err)
		// Trying again is safe only while it is certain that nothing was written.
		var anew *MadeAnewError
		final := written || errors.As(err, &anew) || errors.Is(err, ErrClosed) || errors.Is(err, journal.ErrRefused)
		if final || retry.tries >= l.c.conf.Producer.Retry.Max || !retry.sleep(ctx) {
			return fmt.Errorf("append to %s partition %d: %w", l.topic, partition, err)
		}
	}
}

// produce sends the batch once. With an error, written is false if it certainly is not in the log and never will be.
func (l *PublicLog) produce(
	ctx context.Context, partition int32, batch *sarama.RecordBatch, refresh bool,
) (written bool, err error) {
	addr, err := l.c.leader(ctx, l.topic, partition, refresh)
	if err != nil {
		return false, err
	}
	// The first record of a topic that was made anew must be the first event, not the next one of the old topic.
	if refresh || !l.c.lately(l.topic) {
		if err := l.c.sameTopic(ctx, addr, l.topic); err != nil {
			return false, err
		}
	}
	answer := make(chan batchAnswer, 1)
	group := addr + "/" + strconv.Itoa(int(partition)%produceConns)
	if err := gather(l.c, l.c.batches, group, func(asks []batchAsk) { l.c.sendBatches(addr, group, asks) }).add(batchAsk{l.topic, partition, batch, answer}); err != nil {
		return false, err
	}
	select {
	case a := <-answer:
		return a.written, a.err
	case <-ctx.Done():
		return true, ctx.Err()
	}
}

// batchAsk asks for a batch to be appended.
type batchAsk struct {
	topic     string
	partition int32
	batch     *sarama.RecordBatch
	answer    chan<- batchAnswer
}

// batchAnswer has an error, or written is true. With an error it may be true as well.
type batchAnswer struct {
	written bool
	err     error
}

// sendBatches makes one request of the batches, or as many as a partition has batches: a request holds one of each.
func (c *Client) sendBatches(addr, group string, asks []batchAsk) {
	for len(asks) > 0 {
		type place struct {
			topic     string
			partition int32
		}
		now, later, taken := asks[:0:0], asks[:0:0], map[place]bool{}
		for _, a := range asks {
			if p := (place{a.topic, a.partition}); taken[p] {
				later = append(later, a)
			} else {
				taken[p], now = true, append(now, a)
			}
		}
		c.sendOneOfEach(addr, group, now)
		asks = later
	}
}

func (c *Client) sendOneOfEach(addr, group string, asks []batchAsk) {
	req := &sarama.ProduceRequest{
		Version:      7,
		RequiredAcks: sarama.WaitForAll,
		Timeout:      int32(c.conf.Producer.Timeout.Milliseconds()),
	}
	for _, a := range asks {
		req.AddBatch(a.topic, a.partition, a.batch)
	}
	purpose := "produce " + group
	conn := c.conn(addr, purpose)
	if ok, err := conn.Connected(); !ok {
		c.discard(conn, purpose)
		err = fmt.Errorf("no connection to broker %s: %w", addr, errors.Join(sarama.ErrNotConnected, err))
		for _, a := range asks {
			a.answer <- batchAnswer{false, err}
		}
		return
	}
	resp, err := conn.Produce(req)
	if err != nil {
		c.discard(conn, purpose)
	}
	for _, a := range asks {
		if err != nil {
			a.answer <- batchAnswer{true, err}
			continue
		}
		a.answer <- batchAnswerOf(resp.GetBlock(a.topic, a.partition))
	}
}

func batchAnswerOf(block *sarama.ProduceResponseBlock) batchAnswer {
	if block == nil {
		return batchAnswer{true, errors.New("the broker's answer does not speak of the partition")}
	}
	switch block.Err {
	case sarama.ErrNoError:
		return batchAnswer{true, nil}
	case sarama.ErrNotLeaderForPartition, sarama.ErrLeaderNotAvailable, sarama.ErrUnknownTopicOrPartition,
		sarama.ErrNotEnoughReplicas: // all are found before anything is written
		return batchAnswer{false, block.Err}
	}
	return batchAnswer{true, block.Err}
}

// newBatch is the record batch of these records. It names no producer: the publisher repeats itself by reading its
// own output, not by sequence numbers.
func newBatch(records []journal.Record, now time.Time) *sarama.RecordBatch {
	b := &sarama.RecordBatch{
		Version:         2,
		ProducerID:      -1,
		ProducerEpoch:   -1,
		FirstSequence:   -1,
		LastOffsetDelta: int32(len(records) - 1),
		Records:         make([]*sarama.Record, len(records)),
	}
	total := 0
	for _, r := range records {
		total += len(r.Headers)
	}
	all := make([]sarama.Record, len(records))
	headers, refs := make([]sarama.RecordHeader, 0, total), make([]*sarama.RecordHeader, 0, total)
	for i, r := range records {
		at, first := now, len(refs)
		for _, h := range r.Headers {
			if h.Key == timeHeader {
				if t, err := time.Parse(time.RFC3339Nano, string(h.Value)); err == nil && t.Before(now) && t.Unix() >= 0 {
					at = t
				}
			}
			headers = append(headers, sarama.RecordHeader{Key: headerName(h.Key), Value: h.Value})
			refs = append(refs, &headers[len(headers)-1])
		}
		at = at.Truncate(time.Millisecond)
		if i == 0 {
			b.FirstTimestamp, b.MaxTimestamp = at, at
		}
		if at.After(b.MaxTimestamp) {
			b.MaxTimestamp = at
		}
		all[i] = sarama.Record{
			OffsetDelta: int64(i), TimestampDelta: at.Sub(b.FirstTimestamp), Key: r.Key, Value: r.Value, Headers: refs[first:],
		}
		b.Records[i] = &all[i]
	}
	return b
}
