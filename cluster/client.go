package cluster

import (
	"context"
	"net/url"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// known holds the types that requests and answers are made of. client-go's own
// scheme and clientset have every type of every version of Kubernetes: code
// that a session would keep in memory and never run.
var (
	known  = runtime.NewScheme()
	codecs = serializer.NewCodecFactory(known)
	params = runtime.NewParameterCodec(known)
)

func init() {
	// The core group first: options and Status are then its v1.
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, networkingv1.AddToScheme, authorizationv1.AddToScheme, authenticationv1.AddToScheme,
		autoscalingv2.AddToScheme, coordinationv1.AddToScheme, discoveryv1.AddToScheme, policyv1.AddToScheme,
	} {
		utilruntime.Must(add(known))
	}
}

// Client asks an API server for the few kinds of objects that culvert uses. The
// methods take and return what those of client-go's clientset do, errors are
// *apierrors.StatusError or the network's. It is safe for concurrent use.
type Client struct{ rest func() *rest.RESTClient }

// NewClient makes a client of the server that config names, with config's
// credentials, timeout and rate. It copies config and opens no connection.
func NewClient(config *rest.Config) (*Client, error) {
	r, err := newREST(config)
	if err != nil {
		return nil, err
	}
	return &Client{rest: func() *rest.RESTClient { return r }}, nil
}

func newREST(config *rest.Config) (*rest.RESTClient, error) {
	config = rest.CopyConfig(config)
	// Protobuf costs a fraction of JSON to decode; JSON stays accepted because
	// aggregated and old servers may not speak it.
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.NegotiatedSerializer = codecs.WithoutConversion()
	// Each request names its own path. The version is that of options, which all
	// groups share; objects go out in the one version that is known of them.
	config.APIPath, config.GroupVersion = "/api", &corev1.SchemeGroupVersion
	return rest.RESTClientFor(config)
}

// Version asks for the server's version, to see whether it answers.
func (c *Client) Version(ctx context.Context) error {
	return c.rest().Get().AbsPath("/version").Do(ctx).Error()
}

// Pods are those of a namespace, or all for "".
func (c *Client) Pods(namespace string) Objects[*corev1.Pod, *corev1.PodList] {
	return objects[corev1.Pod, corev1.PodList](c, "/api/v1", namespace, "pods")
}

// Services are those of a namespace, or all for "".
func (c *Client) Services(namespace string) Objects[*corev1.Service, *corev1.ServiceList] {
	return objects[corev1.Service, corev1.ServiceList](c, "/api/v1", namespace, "services")
}

// Events are those of a namespace, or all for "".
func (c *Client) Events(namespace string) Objects[*corev1.Event, *corev1.EventList] {
	return objects[corev1.Event, corev1.EventList](c, "/api/v1", namespace, "events")
}

// Nodes are the cluster's.
func (c *Client) Nodes() Objects[*corev1.Node, *corev1.NodeList] {
	return objects[corev1.Node, corev1.NodeList](c, "/api/v1", "", "nodes")
}

// Namespaces are the cluster's.
func (c *Client) Namespaces() Objects[*corev1.Namespace, *corev1.NamespaceList] {
	return objects[corev1.Namespace, corev1.NamespaceList](c, "/api/v1", "", "namespaces")
}

// Deployments are those of a namespace, or all for "".
func (c *Client) Deployments(namespace string) Objects[*appsv1.Deployment, *appsv1.DeploymentList] {
	return objects[appsv1.Deployment, appsv1.DeploymentList](c, "/apis/apps/v1", namespace, "deployments")
}

// StatefulSets are those of a namespace, or all for "".
func (c *Client) StatefulSets(namespace string) Objects[*appsv1.StatefulSet, *appsv1.StatefulSetList] {
	return objects[appsv1.StatefulSet, appsv1.StatefulSetList](c, "/apis/apps/v1", namespace, "statefulsets")
}

// DaemonSets are those of a namespace, or all for "".
func (c *Client) DaemonSets(namespace string) Objects[*appsv1.DaemonSet, *appsv1.DaemonSetList] {
	return objects[appsv1.DaemonSet, appsv1.DaemonSetList](c, "/apis/apps/v1", namespace, "daemonsets")
}

// ReplicaSets are those of a namespace, or all for "".
func (c *Client) ReplicaSets(namespace string) Objects[*appsv1.ReplicaSet, *appsv1.ReplicaSetList] {
	return objects[appsv1.ReplicaSet, appsv1.ReplicaSetList](c, "/apis/apps/v1", namespace, "replicasets")
}

// ConfigMaps are those of a namespace, or all for "".
func (c *Client) ConfigMaps(namespace string) Objects[*corev1.ConfigMap, *corev1.ConfigMapList] {
	return objects[corev1.ConfigMap, corev1.ConfigMapList](c, "/api/v1", namespace, "configmaps")
}

// Secrets are those of a namespace.
func (c *Client) Secrets(namespace string) Objects[*corev1.Secret, *corev1.SecretList] {
	return objects[corev1.Secret, corev1.SecretList](c, "/api/v1", namespace, "secrets")
}

// Leases are those of a namespace, or all for "".
func (c *Client) Leases(namespace string) Objects[*coordinationv1.Lease, *coordinationv1.LeaseList] {
	return objects[coordinationv1.Lease, coordinationv1.LeaseList](c, "/apis/coordination.k8s.io/v1", namespace, "leases")
}

// PodDisruptionBudgets are those of a namespace, or all for "".
func (c *Client) PodDisruptionBudgets(namespace string) Objects[*policyv1.PodDisruptionBudget, *policyv1.PodDisruptionBudgetList] {
	return objects[policyv1.PodDisruptionBudget, policyv1.PodDisruptionBudgetList](c, "/apis/policy/v1", namespace, "poddisruptionbudgets")
}

// HorizontalPodAutoscalers are those of a namespace.
func (c *Client) HorizontalPodAutoscalers(namespace string) Objects[*autoscalingv2.HorizontalPodAutoscaler, *autoscalingv2.HorizontalPodAutoscalerList] {
	return objects[autoscalingv2.HorizontalPodAutoscaler, autoscalingv2.HorizontalPodAutoscalerList](c, "/apis/autoscaling/v2", namespace, "horizontalpodautoscalers")
}

// NetworkPolicies are those of a namespace, or all for "".
func (c *Client) NetworkPolicies(namespace string) Objects[*networkingv1.NetworkPolicy, *networkingv1.NetworkPolicyList] {
	return objects[networkingv1.NetworkPolicy, networkingv1.NetworkPolicyList](c, "/apis/networking.k8s.io/v1", namespace, "networkpolicies")
}

// Ingresses are those of a namespace, or all for "".
func (c *Client) Ingresses(namespace string) Objects[*networkingv1.Ingress, *networkingv1.IngressList] {
	return objects[networkingv1.Ingress, networkingv1.IngressList](c, "/apis/networking.k8s.io/v1", namespace, "ingresses")
}

// EndpointSlices are those of a namespace.
func (c *Client) EndpointSlices(namespace string) Objects[*discoveryv1.EndpointSlice, *discoveryv1.EndpointSliceList] {
	return objects[discoveryv1.EndpointSlice, discoveryv1.EndpointSliceList](c, "/apis/discovery.k8s.io/v1", namespace, "endpointslices")
}

// ServiceCIDRs are the cluster's; servers before 1.33 have none.
func (c *Client) ServiceCIDRs() Objects[*networkingv1.ServiceCIDR, *networkingv1.ServiceCIDRList] {
	return objects[networkingv1.ServiceCIDR, networkingv1.ServiceCIDRList](c, "/apis/networking.k8s.io/v1", "", "servicecidrs")
}

// SelfSubjectAccessReviews ask whether the caller may do something.
func (c *Client) SelfSubjectAccessReviews() Reviews[*authorizationv1.SelfSubjectAccessReview] {
	return reviews[authorizationv1.SelfSubjectAccessReview](c, "/apis/authorization.k8s.io/v1", "", "selfsubjectaccessreviews")
}

// SelfSubjectReviews ask who the caller is; servers before 1.28 have none.
func (c *Client) SelfSubjectReviews() Reviews[*authenticationv1.SelfSubjectReview] {
	return reviews[authenticationv1.SelfSubjectReview](c, "/apis/authentication.k8s.io/v1", "", "selfsubjectreviews")
}

// object is a pointer to T that can be sent and received.
type object[T any] interface {
	*T
	runtime.Object
}

// Reviews are a resource whose objects can be created only.
type Reviews[T runtime.Object] struct {
	client                      *Client
	prefix, namespace, resource string
	empty                       func() T
}

func reviews[T any, P object[T]](c *Client, prefix, namespace, resource string) Reviews[P] {
	return Reviews[P]{client: c, prefix: prefix, namespace: namespace, resource: resource, empty: func() P { return new(T) }}
}

// request is one for the whole resource.
func (r Reviews[T]) request(verb string) *rest.Request {
	return r.client.rest().Verb(verb).AbsPath(r.prefix).NamespaceIfScoped(r.namespace, r.namespace != "").Resource(r.resource)
}

// Create returns the object as the server made it.
func (r Reviews[T]) Create(ctx context.Context, o T, options metav1.CreateOptions) (T, error) {
	made := r.empty()
	err := r.request("POST").VersionedParams(&options, params).Body(o).Do(ctx).Into(made)
	return made, err
}

// Objects are a resource of type T, whose lists are of type L.
type Objects[T, L runtime.Object] struct {
	Reviews[T]
	emptyList func() L
}

func objects[T, L any, P object[T], Q object[L]](c *Client, prefix, namespace, resource string) Objects[P, Q] {
	return Objects[P, Q]{Reviews: reviews[T, P](c, prefix, namespace, resource), emptyList: func() Q { return new(L) }}
}

// Get returns one object.
func (r Objects[T, L]) Get(ctx context.Context, name string, options metav1.GetOptions) (T, error) {
	o := r.empty()
	err := r.request("GET").Name(name).VersionedParams(&options, params).Do(ctx).Into(o)
	return o, err
}

// List returns one page.
func (r Objects[T, L]) List(ctx context.Context, options metav1.ListOptions) (L, error) {
	page := r.emptyList()
	err := r.request("GET").VersionedParams(&options, params).Do(ctx).Into(page)
	return page, err
}

// Watch streams changes until the server or ctx ends it; the caller stops it.
func (r Objects[T, L]) Watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	options.Watch = true
	return r.request("GET").VersionedParams(&options, params).Watch(ctx)
}

// Update replaces one object; an object whose resourceVersion is set is replaced
// only if it is still that one (a conflict otherwise).
func (r Objects[T, L]) Update(ctx context.Context, name string, o T, options metav1.UpdateOptions) (T, error) {
	made := r.empty()
	err := r.request("PUT").Name(name).VersionedParams(&options, params).Body(o).Do(ctx).Into(made)
	return made, err
}

// Patch changes one object, or a subresource of it.
func (r Objects[T, L]) Patch(ctx context.Context, name string, kind types.PatchType, data []byte, options metav1.PatchOptions, subresources ...string) (T, error) {
	made := r.empty()
	err := r.client.rest().Patch(kind).AbsPath(r.prefix).NamespaceIfScoped(r.namespace, r.namespace != "").Resource(r.resource).
		Name(name).SubResource(subresources...).VersionedParams(&options, params).Body(data).Do(ctx).Into(made)
	return made, err
}

// Delete asks for the end of one object.
func (r Objects[T, L]) Delete(ctx context.Context, name string, options metav1.DeleteOptions) error {
	return r.request("DELETE").Name(name).Body(&options).Do(ctx).Error()
}

// URL is that of a subresource, e.g. "portforward".
func (r Objects[T, L]) URL(name, subresource string) *url.URL {
	return r.request("POST").Name(name).SubResource(subresource).URL()
}
