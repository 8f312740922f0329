package kafka

import (
	"context"
	"errors"
	"os"
	"strconv"
	"sync"
	"testing"

	"github.com/IBM/sarama"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"wharf/infra/journal"
)

var errEnough = errors.New("enough")

// readTo is what a Read brings until its position is `to`.
func readTo(t testing.TB, r journal.Reader, partition int32, from, to int64) (records []journal.Record) {
	t.Helper()
	if from >= to {
		return nil
	}
	err := r.Read(bounded(t), partition, from, func(b journal.Batch) error {
		records = append(records, b.Records...)
		if b.Next >= to {
			return errEnough
		}
		return nil
	})
	if err != errEnough {
		t.Errorf("read partition %d from %d to %d: %v", partition, from, to, err)
	}
	return records
}

// wantNumbers checks that the values are the numbers from first on, at offsets without a gap.
func wantNumbers(t testing.TB, got []journal.Record, first, n int) {
	t.Helper()
	if len(got) != n {
		t.Errorf("got %d records, want %d", len(got), n)
		return
	}
	for i, r := range got {
		if string(r.Value) != strconv.Itoa(first+i) || r.Offset != got[0].Offset+int64(i) {
			t.Errorf("record %d is %q at offset %d, want %d at %d", i, r.Value, r.Offset, first+i, got[0].Offset+int64(i))
			return
		}
	}
}

func onlyFake(t testing.TB) {
	if os.Getenv("WHARF_TEST_KAFKA") != "" {
		t.Skip("needs a broker that does what the test says")
	}
}

func TestReadFollowsTheLog(t *testing.T) {
	c := connect(t, brokers(t))
	log := c.PublicLog(topic(t, c, 2))
	appendAll(t, log, 0, numbered(0, 0, 10))
	wantNumbers(t, readTo(t, log, 0, 0, 10), 0, 10)
	wantNumbers(t, readTo(t, log, 0, 7, 10), 7, 3) // in the middle of a batch

	var wg sync.WaitGroup
	for _, from := range []int64{0, 7, 10, 10} { // together, some at the same place
		wg.Go(func() { wantNumbers(t, readTo(t, log, 0, from, 510), int(from), int(510-from)) })
	}
	for i := range 50 {
		appendAll(t, log, 0, numbered(0, 10+10*i, 10))
	}
	wg.Wait()
	if end, err := log.End(t.Context(), 0); err != nil || end != 510 {
		t.Errorf("the end is %d, %v, want 510", end, err)
	}
}

func TestReadEndsWithItsContext(t *testing.T) {
	c := connect(t, brokers(t))
	log := c.PublicLog(topic(t, c, 1))
	ctx, cancel := context.WithCancel(t.Context())
	appendAll(t, log, 0, numbered(0, 0, 1))
	err := log.Read(ctx, 0, 0, func(journal.Batch) error { cancel(); return nil })
	if err != context.Canceled {
		t.Errorf("got %v, want context.Canceled", err)
	}
	if _, err := log.End(ctx, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

// Control records and aborted transactions: all messages are read, and the position goes past what is no message.
func TestReadPassesControlRecords(t *testing.T) {
	addrs := brokers(t)
	c := connect(t, addrs)
	name := topic(t, c, 1)
	conf := saramaConfig(c.cfg)
	conf.Producer.Transaction.ID = name
	p, err := sarama.NewSyncProducer(addrs, conf)
	if err != nil {
		t.Fatal(err)
	}
	for i, end := range []func() error{p.CommitTxn, p.AbortTxn, p.CommitTxn} {
		if err := p.BeginTxn(); err != nil {
			t.Fatal(err)
		}
		msg := &sarama.ProducerMessage{Topic: name, Value: sarama.StringEncoder(strconv.Itoa(i))}
		if _, _, err := p.SendMessage(msg); err != nil {
			t.Fatal(err)
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, end := bounded(t), int64(0)
	for end < 6 { // a broker may answer a commit before it has written the control record
		if end, err = c.Reader(name).End(ctx, 0); err != nil {
			t.Fatal(err)
		}
	}
	got := readTo(t, c.Reader(name), 0, 0, end)
	if len(got) != 3 || got[0].Offset != 0 || got[1].Offset != 2 || got[2].Offset != 4 {
		t.Errorf("got %+v, want messages at 0, 2 and 4", got)
	}
	if got := readTo(t, c.Reader(name), 0, 5, end); len(got) != 0 {
		t.Errorf("got %+v, want nothing from 5 on", got)
	}
}

func TestReadNeverJumps(t *testing.T) {
	addrs := brokers(t)
	c := connect(t, addrs)
	log := c.PublicLog(topic(t, c, 1))
	for range 10 { // Kafka deletes from the start of a batch only
		appendAll(t, log, 0, numbered(0, 0, 1))
	}
	a, err := sarama.NewClusterAdmin(addrs, c.conf)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := a.DeleteRecords(log.Topic(), map[int32]int64{0: 4}); err != nil {
		t.Fatal(err)
	}
	for _, from := range []int64{3, 11} {
		err := log.Read(bounded(t), 0, from, func(b journal.Batch) error {
			t.Errorf("from %d: got a batch up to %d", from, b.Next)
			return errEnough
		})
		var gone *OutOfRangeError
		if !errors.As(err, &gone) || gone.Offset != from || gone.Start != 4 || gone.End != 10 {
			t.Errorf("from %d: got %v, want an OutOfRangeError from 4 to 10", from, err)
		}
	}
	if got := readTo(t, log, 0, 4, 10); len(got) != 6 {
		t.Errorf("got %d records from 4 on, want 6", len(got))
	}
}

// A record batch may be larger than what is fetched of a partition at a time.
func TestReadLargeBatches(t *testing.T) {
	c := connect(t, brokers(t))
	log := c.PublicLog(topic(t, c, 3))
	var wg sync.WaitGroup
	for p := range int32(3) {
		wg.Go(func() {
			for range 3 {
				records := numbered(p, 0, 3)
				for i := range records {
					records[i].Value = make([]byte, 600<<10)
				}
				if err := log.AppendBatch(t.Context(), p, records); err != nil {
					t.Error(err)
				}
			}
			if got := readTo(t, log, p, 0, 9); len(got) != 9 {
				t.Errorf("got %d records, want 9", len(got))
			}
		})
	}
	wg.Wait()
}

// One request asks for all partitions.
func TestReadsShareRequests(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1))
	c := connect(t, cluster.ListenAddrs())
	log := c.PublicLog(topic(t, c, 12))
	shared := make(chan struct{})
	var once sync.Once
	cluster.ControlKey(int16(kmsg.Fetch), func(req kmsg.Request) (kmsg.Response, error, bool) {
		cluster.KeepControl()
		if f := req.(*kmsg.FetchRequest); len(f.Topics) == 1 && len(f.Topics[0].Partitions) == 12 {
			once.Do(func() { close(shared) })
		}
		return nil, nil, false
	})
	ctx, cancel := context.WithCancel(bounded(t))
	var wg sync.WaitGroup
	for p := range int32(12) {
		for range 3 {
			wg.Go(func() { _ = log.Read(ctx, p, 0, func(journal.Batch) error { return nil }) })
		}
	}
	select {
	case <-shared:
	case <-ctx.Done():
		t.Error("no request asked for all partitions")
	}
	cancel()
	wg.Wait()
}

func TestSlowReaderHoldsUpNobody(t *testing.T) {
	c := connect(t, brokers(t))
	log := c.PublicLog(topic(t, c, 2))
	large := func(n int) []journal.Record {
		records := numbered(0, 0, n)
		for i := range records {
			records[i].Value = append(make([]byte, queueBytes), records[i].Value...)
		}
		return records
	}
	appendAll(t, log, 0, large(3))
	slow, free := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var wg sync.WaitGroup
	wg.Go(func() {
		n := int64(0)
		err := log.Read(bounded(t), 0, 0, func(b journal.Batch) error {
			once.Do(func() { close(slow) })
			<-free
			for _, r := range b.Records {
				if r.Offset != n {
					t.Errorf("got offset %d, want %d", r.Offset, n)
				}
				n++
			}
			if n == 12 {
				return errEnough
			}
			return nil
		})
		if err != errEnough {
			t.Error(err)
		}
	})
	<-slow
	for range 3 { // more than it may have waiting
		appendAll(t, log, 0, large(3))
	}
	for i := range 20 {
		appendAll(t, log, 1, numbered(1, i, 1))
		wantNumbers(t, readTo(t, log, 1, 0, int64(i+1)), 0, i+1)
	}
	if got := readTo(t, log, 0, 0, 12); len(got) != 12 { // nor another one of the same partition
		t.Errorf("got %d records, want 12", len(got))
	}
	close(free)
	wg.Wait()
}

func TestLeaderMoves(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(3))
	c := connect(t, cluster.ListenAddrs())
	name := topic(t, c, 1)
	public, private := c.PublicLog(name), c.Log(name)
	var wg sync.WaitGroup
	wg.Go(func() { wantNumbers(t, readTo(t, public, 0, 0, 30), 0, 30) })
	for i := range 30 {
		if err := cluster.MoveTopicPartition(name, 0, int32(i%3)); err != nil {
			t.Fatal(err)
		}
		r := numbered(0, i, 1)
		if i%2 == 0 {
			appendAll(t, public, 0, r)
		} else if err := private.Append(t.Context(), r[0]); err != nil {
			t.Fatal(err)
		}
		if end, err := public.End(t.Context(), 0); err != nil || end != int64(i+1) {
			t.Fatalf("the end is %d, %v, want %d", end, err, i+1)
		}
	}
	wg.Wait()
}

// Whatever a broker answers, reading goes on, and hands out each record once.
func TestReadSurvivesFaults(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1))
	c := connect(t, cluster.ListenAddrs())
	log := c.PublicLog(topic(t, c, 2))
	n := 0
	cluster.ControlKey(int16(kmsg.Fetch), func(req kmsg.Request) (kmsg.Response, error, bool) {
		cluster.KeepControl()
		f := req.(*kmsg.FetchRequest)
		if n++; n > 24 {
			return nil, nil, false
		}
		resp := f.ResponseKind().(*kmsg.FetchResponse)
		switch n % 4 {
		case 0:
			return nil, errors.New("the connection breaks"), true
		case 1:
			return nil, nil, false
		case 2:
			resp.ErrorCode = int16(sarama.ErrUnknown)
			return resp, nil, true
		}
		for _, ft := range f.Topics {
			rt := kmsg.NewFetchResponseTopic()
			rt.Topic = ft.Topic
			for _, fp := range ft.Partitions {
				rp := kmsg.NewFetchResponseTopicPartition()
				rp.Partition = fp.Partition
				// No error that speaks of the offset may be believed without asking.
				rp.ErrorCode = int16(sarama.ErrOffsetOutOfRange)
				rt.Partitions = append(rt.Partitions, rp)
			}
			resp.Topics = append(resp.Topics, rt)
		}
		return resp, nil, true
	})
	var wg sync.WaitGroup
	for p := range int32(2) {
		wg.Go(func() { wantNumbers(t, readTo(t, log, p, 0, 20), 0, 20) })
		wg.Go(func() {
			for i := range 20 {
				appendAll(t, log, p, numbered(p, i, 1))
			}
		})
	}
	wg.Wait()
}

// What nobody waits for any more is not asked of a broker that has stood still.
func TestAsksThatNobodyWaitsForAreForgotten(t *testing.T) {
	cluster := fake(t, kfake.NumBrokers(1))
	c := connectWith(t, Config{Brokers: cluster.ListenAddrs()})
	log := c.PublicLog(topic(t, c, 12))
	release, asked := make(chan struct{}), make(chan struct{}, 100)
	cluster.ControlKey(int16(kmsg.ListOffsets), func(kmsg.Request) (kmsg.Response, error, bool) {
		cluster.KeepControl()
		asked <- struct{}{}
		<-release
		return nil, nil, false
	})
	first := make(chan error, 1)
	go func() {
		_, err := log.End(t.Context(), 0)
		first <- err
	}()
	<-asked
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for range 10 * gathered {
		if _, err := c.askEnd(gone, cluster.ListenAddrs()[0], "any", 0); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	close(release)
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	if _, err := log.End(bounded(t), 1); err != nil {
		t.Fatal(err)
	}
	if n := len(asked); n > 1 {
		t.Errorf("%d requests after the first", n)
	}
}
