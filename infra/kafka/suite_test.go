package kafka

import (
	"context"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/tests"
)

// suiteSubscriber makes the suite's topics, which a Subscriber leaves to `wharf topics`.
type suiteSubscriber struct{ *Subscriber }

func (s suiteSubscriber) SubscribeInitialize(name string) error {
	return s.c.CreateTopics(context.Background(), []TopicSpec{{Name: name, Partitions: 4, Replication: 1}})
}

// TestWatermillSuite runs Watermill's own tests for Pub/Subs, once with messages ordered by payload, and once with
// no order but that of equal UUIDs.
func TestWatermillSuite(t *testing.T) {
	for name, suite := range map[string]struct {
		key     func(*message.Message) string
		ordered bool
	}{
		"ordered":   {func(msg *message.Message) string { return string(msg.Payload) }, true},
		"unordered": {func(msg *message.Message) string { return msg.UUID }, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, brokers(t))
			create := func(t *testing.T, group string) (message.Publisher, message.Subscriber) {
				key := suite.key
				sub := NewSubscriber(c, SubscriberConfig{
					Group:              group,
					Targets:            func(msg *message.Message) ([]string, error) { return []string{key(msg)}, nil },
					RedeliveryDelay:    time.Millisecond,
					RedeliveryDelayMax: 10 * time.Millisecond,
					DrainTimeout:       100 * time.Millisecond,
				})
				t.Cleanup(func() { _ = sub.Close() }) // the suite forgets some
				pub := NewPublisher(c, PublisherConfig{Key: func(_ string, msg *message.Message) string { return key(msg) }})
				return pub, suiteSubscriber{sub}
			}
			t.Run("all", func(t *testing.T) { // ends when the suite's parallel tests have
				tests.TestPubSub(t, tests.Features{
					ConsumerGroups: true, GuaranteedOrder: suite.ordered, Persistent: true, ForceShort: false,
				}, func(t *testing.T) (message.Publisher, message.Subscriber) { return create(t, t.Name()) }, create)
			})
		})
	}
}
