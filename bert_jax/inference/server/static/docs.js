// The documentation of the routes at /docs, by Swagger UI.
"use strict";

SwaggerUIBundle({ url: "openapi.json", dom_id: "#routes", deepLinking: true, validatorUrl: null });
