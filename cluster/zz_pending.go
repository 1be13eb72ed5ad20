package cluster

import "context"

const AnnotationScaled = "culvert.dev/scaled"

type scaledBack struct {
	Changed bool
	Gate    string
}

func (c *Cluster) ScaleBack(ctx context.Context, namespace, kind, name, session string, say func(string)) (scaledBack, error) {
	return scaledBack{}, nil
}
func (c *Cluster) planScaleHead(ctx context.Context, i *Intercept) error { return nil }

const scalePrefix = "scale."

func scaleKeyOf(s string) string { return "" }

type scaleHead struct {
	exchangeHead
	c         *Cluster
	key, name string
	list      []PlanPort
}
