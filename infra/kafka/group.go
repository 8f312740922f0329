package kafka

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/IBM/sarama"
)

// RunGroup takes part in the consumer group, as one member with all the topics, and runs `owned` in a goroutine for
// every partition number that this member holds of all of them, until another member has to get it: then ctx of that
// call ends, and nobody else gets the partition before it has returned (but a member that falls silent, or takes longer
// than 10 s, is given up by the group). An owned that returns early is not called again until the group has shared
// out its partitions anew.
//
// It returns nil when ctx ends, once every owned has returned and the group has been told, so that others take over at
// once. Brokers that are away are waited for. Offsets are neither read nor committed.
func (c *Client) RunGroup(
	ctx context.Context, name string, topics []string, owned func(ctx context.Context, partition int32),
) error {
	return c.join(ctx, name, topics, nil, func(s *session) {
		var wg sync.WaitGroup
		for _, p := range s.heldOfAll(topics) {
			wg.Go(func() { owned(s.Context(), p) })
		}
		wg.Wait()
	})
}

// session is a time during which this member's partitions do not change. Its Context ends with it.
type session struct {
	sarama.ConsumerGroupSession
	client sarama.Client
	group  string
}

// heldOfAll is the partition numbers that the member holds of all the topics.
func (s *session) heldOfAll(topics []string) (held []int32) {
	claims := s.Claims()
	for _, p := range claims[topics[0]] {
		if !slices.ContainsFunc(topics, func(t string) bool { return !slices.Contains(claims[t], p) }) {
			held = append(held, p)
		}
	}
	return held
}

// committed is what the group committed for the claimed partitions, with the metadata, which Sarama does not hand out.
func (s *session) committed() (*sarama.OffsetFetchResponse, error) {
	b, err := s.client.Coordinator(s.group)
	if err != nil {
		return nil, err
	}
	resp, err := b.FetchOffset(sarama.NewOffsetFetchRequest(s.client.Config().Version, s.group, s.Claims()))
	if err != nil {
		_ = b.Close() // see Client.discard
		return nil, err
	}
	if resp.GroupError() != sarama.ErrNoError {
		return nil, resp.GroupError()
	}
	return resp, nil
}

// longestSession is beyond what a cluster will ask for.
const longestSession = 2 * time.Minute

// join is a member of the group until ctx ends. For every session it calls setup, whose error ends the session (it is
// tried again), and then run, which must return soon after the session's context has ended.
func (c *Client) join(
	ctx context.Context, name string, topics []string, setup func(*session) error, run func(*session),
) error {
	if len(topics) == 0 {
		return errors.New("join a group: no topics given")
	}
	// A member needs connections of its own: the coordinator holds back its answer to a join.
	conf := *c.conf
	session := &conf.Consumer.Group.Session.Timeout
	cl, err := dial(ctx, c.cfg.Brokers, &conf)
	if err != nil {
		return nil // ctx has ended
	}
	defer func() { _ = cl.Close() }()
	g, err := sarama.NewConsumerGroupFromClient(name, assignmentOnly{cl})
	if err != nil {
		return fmt.Errorf("join group %s: %w", name, err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for err := range g.Errors() {
			c.log.Warn("consumer group", "group", name, "err", err)
		}
	})
	defer func() {
		if err := g.Close(); err != nil {
			c.log.Warn("leaving the consumer group failed, it will notice", "group", name, "err", err)
		}
	}()
	for retry := (backoff{}); ctx.Err() == nil; {
		h := &member{client: cl, group: name, setup: setup, run: run}
		err := g.Consume(ctx, topics, h)
		switch {
		case err == nil || h.began:
			retry = backoff{}
		case errors.Is(err, sarama.ErrInvalidSessionTimeout) && *session < longestSession:
			*session *= 2 // there is no asking what they allow
			c.log.Warn("the brokers allow no session as short as that, and a longer one is tried: a member that dies is noticed later",
				"group", name, "next", *session)
		case ctx.Err() == nil:
			c.log.Warn("joining the consumer group failed, and is tried again", "group", name, "err", err)
		}
		retry.sleep(ctx)
	}
	return nil
}

// assignmentOnly keeps Sarama from fetching: it waits with that for partitions that are not readable. All reading is
// done by Reader, which loses no position and shares its requests.
type assignmentOnly struct{ sarama.Client }

func (assignmentOnly) PartitionNotReadable(string, int32) bool { return true }

// member is the sarama.ConsumerGroupHandler of one session.
type member struct {
	client sarama.Client
	group  string
	setup  func(*session) error
	run    func(*session)

	began bool
	ended chan struct{}
}

func (m *member) Setup(s sarama.ConsumerGroupSession) error {
	session := &session{s, m.client, m.group}
	if m.setup != nil {
		if err := m.setup(session); err != nil {
			return err
		}
	}
	m.began = true
	m.ended = make(chan struct{})
	go func() {
		defer close(m.ended)
		m.run(session)
	}()
	return nil
}

func (m *member) Cleanup(sarama.ConsumerGroupSession) error {
	if m.ended != nil {
		<-m.ended
	}
	return nil
}

// ConsumeClaim is never called: see assignmentOnly.
func (m *member) ConsumeClaim(sarama.ConsumerGroupSession, sarama.ConsumerGroupClaim) error {
	return nil
}
