package kafka

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/IBM/sarama"

	"wharf/infra/journal"
)

// Reader reads one topic. It is a journal.Reader. All reading of a topic through one Client is done together, see
// fetch.go: any number of Reads cost hardly more requests than one.
type Reader struct {
	c     *Client
	topic string

	mu    sync.Mutex // guards what follows, and the fields of nodes and readings
	nodes map[string]*node
}

// Reader is the reader of that topic, the same one every time.
func (c *Client) Reader(topic string) *Reader {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.readers[topic]
	if r == nil {
		r = &Reader{c: c, topic: topic, nodes: map[string]*node{}}
		c.readers[topic] = r
	}
	return r
}

// Topic is the name of the topic.
func (r *Reader) Topic() string { return r.topic }

// OutOfRangeError says that a log does not have the offset that was to be read: it was shortened or made anew.
type OutOfRangeError struct {
	Topic      string
	Partition  int32
	Offset     int64 // that was asked for
	Start, End int64 // of what there is
}

func (e *OutOfRangeError) Error() string {
	what := fmt.Sprintf("the log starts at %d: records were deleted", e.Start)
	if e.Offset > e.End {
		what = fmt.Sprintf("the log ends at %d: it lost records, or the topic was made anew", e.End)
	}
	return fmt.Sprintf("%s partition %d cannot be read from offset %d, %s", e.Topic, e.Partition, e.Offset, what)
}

// Read hands every record of the partition from offset `from` on to f; see journal.Reader. An *OutOfRangeError says
// that the log does not have the offset, a *MadeAnewError that it is another one than this Client has met before. A slow
// f holds up nobody else's reading.
func (r *Reader) Read(ctx context.Context, partition int32, from int64, f func(journal.Batch) error) error {
	s := &reading{partition: partition, next: from, maxBytes: fetchBytes, wake: make(chan struct{}, 1)}
	defer r.leave(s)
	fault := r.place(ctx, s, false)
	for retry := (backoff{}); ; {
		if fault != nil {
			var gone *OutOfRangeError
			var anew *MadeAnewError
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case r.c.ctx.Err() != nil:
				return ErrClosed
			case errors.Is(fault, sarama.ErrOffsetOutOfRange):
				fault = r.outOfRange(ctx, s)
			}
			if errors.As(fault, &gone) || errors.As(fault, &anew) {
				return fault
			}
			r.complain(partition, retry.tries, fault)
			retry.sleep(ctx)
			fault = r.place(ctx, s, true)
			continue
		}
		var b journal.Batch
		var ok bool
		if b, ok, fault = r.pop(s); fault != nil {
			continue
		}
		if ok {
			retry = backoff{}
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f(b); err != nil {
				return err
			}
			continue
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return ctx.Err()
		case <-r.c.ctx.Done():
			return ErrClosed
		}
	}
}

// complain logs a fault that goes on: not the first tries, which every change of leaders costs, and then ever less.
func (r *Reader) complain(partition int32, tries int, fault error) {
	if tries == 3 || tries%30 == 29 {
		r.c.log.Warn("reading from Kafka fails, and is tried again",
			"topic", r.topic, "partition", partition, "tries", tries, "err", fault)
	}
}

// outOfRange finds out what the broker meant: an *OutOfRangeError, a *MadeAnewError, or a passing fault.
func (r *Reader) outOfRange(ctx context.Context, s *reading) error {
	r.mu.Lock()
	gone := &OutOfRangeError{Topic: r.topic, Partition: s.partition, Offset: s.next}
	r.mu.Unlock()
	addr, err := r.c.leader(ctx, r.topic, s.partition, true)
	if err == nil {
		err = r.c.sameTopic(ctx, addr, r.topic)
	}
	if err != nil {
		return err
	}
	got := make(chan [2]int64, 1)
	err = r.c.do(ctx, func() error {
		start, err := r.c.sarama.GetOffset(r.topic, s.partition, sarama.OffsetOldest)
		if err != nil {
			return err
		}
		end, err := r.c.sarama.GetOffset(r.topic, s.partition, sarama.OffsetNewest)
		got <- [2]int64{start, end}
		return err
	})
	if err != nil {
		return err
	}
	limits := <-got
	gone.Start, gone.End = limits[0], limits[1]
	if gone.Start <= gone.Offset && gone.Offset <= gone.End {
		return sarama.ErrOffsetNotAvailable // a broker that was not up to date
	}
	return gone
}

// End is the offset that the partition's next record will get; see journal.Reader. It is tried until ctx ends.
func (r *Reader) End(ctx context.Context, partition int32) (int64, error) {
	for retry := (backoff{}); ; {
		addr, err := r.c.leader(ctx, r.topic, partition, retry.tries > 0)
		if err == nil {
			var end int64
			if end, err = r.c.askEnd(ctx, addr, r.topic, partition); err == nil {
				return end, nil
			}
		}
		if errors.Is(err, ErrClosed) || !retry.sleep(ctx) {
			return 0, fmt.Errorf("find the end of %s partition %d: %w", r.topic, partition, err)
		}
		r.complain(partition, retry.tries, err)
	}
}

// endAsk asks for the end of a partition.
type endAsk struct {
	ctx       context.Context // of who waits for the answer
	topic     string
	partition int32
	answer    chan<- endAnswer
}

type endAnswer struct {
	end int64
	err error
}

func (c *Client) askEnd(ctx context.Context, addr, topic string, partition int32) (int64, error) {
	answer := make(chan endAnswer, 1)
	if err := gather(c, c.ends, addr, func(asks []endAsk) { c.askEnds(addr, asks) }).add(endAsk{ctx, topic, partition, answer}); err != nil {
		return 0, err
	}
	select {
	case a := <-answer:
		return a.end, a.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (c *Client) askEnds(addr string, asks []endAsk) {
	asks = slices.DeleteFunc(asks, func(a endAsk) bool { return a.ctx.Err() != nil })
	if len(asks) == 0 { // a broker that stood still is not asked for what nobody waits for any more
		return
	}
	req := sarama.NewOffsetRequest(c.conf.Version)
	for _, a := range asks {
		req.AddBlock(a.topic, a.partition, sarama.OffsetNewest, 1)
	}
	conn := c.conn(addr, "ends")
	resp, err := conn.GetAvailableOffsets(req)
	if err != nil {
		c.discard(conn, "ends")
	}
	for _, a := range asks {
		switch {
		case err != nil:
			a.answer <- endAnswer{err: err}
		case resp.GetBlock(a.topic, a.partition) == nil:
			a.answer <- endAnswer{err: sarama.ErrIncompleteResponse}
		default:
			b := resp.GetBlock(a.topic, a.partition)
			var err error
			if b.Err != sarama.ErrNoError {
				err = b.Err
			}
			a.answer <- endAnswer{b.Offset, err}
		}
	}
}
